//! The engine of nbdserver: it moves bytes. What they mean is decided in Python; this is the only file that knows Python.

mod buddies;
mod cache;
mod client;
mod connection;
mod direct;
mod dirty;
mod engine;
mod export;
mod extents;
mod fault;
mod file;
#[cfg(test)]
mod fuzz;
mod handshake;
mod limits;
mod meter;
mod parts;
mod peer;
mod points;
mod pool;
#[cfg(test)]
mod random;
mod record;
mod region;
mod register;
mod request;
mod ring;
mod serial;
mod server;
mod threads;
mod tls;
mod transfer;
mod transform;
mod users;
mod vector;
mod wire;
mod worker;

use std::collections::HashMap;
use std::ffi::OsString;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyMemoryView, PySlice, PyString};
use rustix::io::Errno;

use crate::engine::{Backend, Mode, Settings};
use crate::extents::{Packing, Piece, Target, Through};
use crate::fault::Step;
use crate::handshake::{Action, Said};
use crate::limits::Limits;
use crate::peer::Peer;
use crate::request::Failure;
use crate::vector::Vector;
use crate::wire::Style;

fn os_error(errno: Errno) -> PyErr {
    let error = std::io::Error::from(errno);
    PyOSError::new_err((errno.raw_os_error(), error.to_string()))
}

/// Take over a descriptor that Python gives away.
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the stub's contract is that the caller owns `fd` and will not use or close it after the call.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).map_err(|error| PyValueError::new_err(error.to_string()))
}

// -- memory ------------------------------------------------------------------------------------------------------

/// Memory of the pool (or ordinary memory, when that is used up), seen from Python.
#[pyclass(frozen, module = "nbdserver._engine")]
struct Slot {
    slot: Arc<pool::Slot>,
}

#[pymethods]
impl Slot {
    #[getter]
    fn view<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyMemoryView>> {
        PyMemoryView::from(slf)
    }

    #[getter]
    fn registration(&self) -> Option<(u32, u32, u32)> {
        let registration = self.slot.registration()?;
        Some((
            registration.pool,
            registration.slot,
            registration.generation,
        ))
    }

    fn __len__(&self) -> usize {
        self.slot.len()
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: std::ffi::c_int,
    ) -> PyResult<()> {
        let slot = slf.get().slot.clone();
        let (memory, length) = (slot.as_ptr(), slot.len());
        // SAFETY: the view holds a reference to this object and this object holds the slot, so the memory outlives it.
        let filled = unsafe {
            let length = length as ffi::Py_ssize_t;
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), memory.cast(), length, 0, flags)
        };
        if filled == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

/// The segments of a vector of Python's: slots as they are; other memory by way of a bounce buffer.
struct Segments<'py> {
    vector: Vector,
    /// Ordinary memory, and which range of `vector` stands for it.
    foreign: Vec<(PyBuffer<u8>, Range<usize>)>,
    py: Python<'py>,
}

impl<'py> Segments<'py> {
    fn of(engine: &engine::Engine, vector: &Bound<'py, PyAny>) -> PyResult<Segments<'py>> {
        let mut segments = Vec::new();
        let mut foreign = Vec::new();
        let mut position = 0;
        for segment in vector.getattr("segments")?.try_iter()? {
            let (buffer, start, length): (Bound<'py, PyAny>, usize, usize) = segment?.extract()?;
            let slice = PySlice::new(vector.py(), start as isize, (start + length) as isize, 1);
            if let Ok(slot) = buffer.cast::<Slot>() {
                let slot = slot.get().slot.clone();
                let end = start.checked_add(length).filter(|end| *end <= slot.len());
                let end = end.ok_or_else(|| PyValueError::new_err("a segment past its slot"))?;
                segments.push((slot, start..end));
            } else {
                let memory = PyBuffer::<u8>::get(&buffer.getattr("view")?.get_item(slice)?)?;
                foreign.push((memory, position..position + length));
                let bounce = engine.pool.allocate_bounce(length);
                for slot in bounce.ok_or_else(|| os_error(Errno::NOMEM))? {
                    let range = 0..slot.len();
                    segments.push((Arc::new(slot), range));
                }
            }
            position += length;
        }
        Ok(Segments {
            vector: Vector::of(segments),
            foreign,
            py: vector.py(),
        })
    }

    /// Copy ordinary memory into its bounce buffers, before a write.
    fn bounce_in(&self) -> PyResult<()> {
        for (memory, range) in &self.foreign {
            let mut bytes = vec![0; range.len()];
            memory.copy_to_slice(self.py, &mut bytes)?;
            self.vector.fill(range.start, &bytes);
        }
        Ok(())
    }

    /// Copy bounce buffers out to the ordinary memory they stand for, after a read.
    fn bounce_out(&self) -> PyResult<()> {
        for (memory, range) in &self.foreign {
            memory.copy_from_slice(self.py, &self.vector.to_vec(range.clone()))?;
        }
        Ok(())
    }
}

// -- files -------------------------------------------------------------------------------------------------------

/// An open file of the engine's: `nbdserver.extent.OpenFile`.
#[pyclass(frozen, module = "nbdserver._engine")]
struct File {
    engine: Arc<engine::Engine>,
    file: Arc<file::File>,
    /// `nbdserver.extent.BlockLimits`.
    #[pyo3(get)]
    limits: Py<PyAny>,
}

/// A place in use, for the time of a `with` block.
#[pyclass(module = "nbdserver._engine")]
struct Use {
    engine: Arc<engine::Engine>,
    place: (u32, u64, u64),
    held: Option<users::Use>,
}

#[pymethods]
impl Use {
    fn __enter__(&mut self) {
        let (file, offset, length) = self.place;
        self.held = Some(
            self.engine
                .users
                .enter(self.engine.shard(), file, offset, length),
        );
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&mut self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.held = None;
    }
}

impl File {
    fn segments<'py>(&self, vector: &Bound<'py, PyAny>) -> PyResult<Segments<'py>> {
        let segments = Segments::of(&self.engine, vector)?;
        let bounced: usize = segments.foreign.iter().map(|(_, range)| range.len()).sum();
        self.file
            .counters
            .bounced
            .fetch_add(bounced as u64, Relaxed);
        Ok(segments)
    }

    fn enter(&self, offset: u64, length: u64) -> users::Use {
        self.engine
            .users
            .enter(self.engine.shard(), self.file.id, offset, length)
    }
}

#[pymethods]
impl File {
    #[getter]
    fn id(&self) -> u32 {
        self.file.id
    }

    #[getter]
    fn name(&self) -> &str {
        &self.file.name
    }

    #[getter]
    fn size(&self) -> PyResult<u64> {
        self.file.size().map_err(os_error)
    }

    #[getter]
    fn stored(&self) -> PyResult<u64> {
        self.file.stored().map_err(os_error)
    }

    #[getter]
    fn read_only(&self) -> bool {
        self.file.read_only
    }

    /// (memory, block) alignment of direct I/O, or None.
    #[getter]
    fn alignment(&self) -> Option<(usize, u64)> {
        self.file
            .direct
            .map(|alignment| (alignment.memory, alignment.block))
    }

    fn read(&self, py: Python<'_>, offset: u64, vector: &Bound<'_, PyAny>) -> PyResult<()> {
        let segments = self.segments(vector)?;
        let memory = &segments.vector;
        py.detach(|| {
            let _usage = self.enter(offset, memory.len() as u64);
            self.file.read(offset, memory, 0..memory.len())
        })
        .map_err(os_error)?;
        segments.bounce_out()
    }

    fn write(&self, py: Python<'_>, offset: u64, vector: &Bound<'_, PyAny>) -> PyResult<()> {
        let segments = self.segments(vector)?;
        segments.bounce_in()?;
        let memory = &segments.vector;
        py.detach(|| {
            let _usage = self.enter(offset, memory.len() as u64);
            self.file.write(offset, memory, 0..memory.len())
        })
        .map_err(os_error)
    }

    #[pyo3(signature = (offset, length, *, may_unmap, no_fallback))]
    fn zero(
        &self,
        py: Python<'_>,
        offset: u64,
        length: u64,
        may_unmap: bool,
        no_fallback: bool,
    ) -> PyResult<()> {
        py.detach(|| {
            let _usage = self.enter(offset, length);
            self.file.zero(offset, length, may_unmap, no_fallback)
        })
        .map_err(os_error)
    }

    fn discard(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        py.detach(|| {
            let _usage = self.enter(offset, length);
            self.file.discard(offset, length)
        })
        .map_err(os_error)
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.file.sync()).map_err(os_error)
    }

    fn resize(&self, py: Python<'_>, size: u64) -> PyResult<()> {
        py.detach(|| self.file.resize(size)).map_err(os_error)
    }

    fn status(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<Vec<(u64, bool)>> {
        py.detach(|| self.file.status(offset, length))
            .map_err(os_error)
    }

    fn r#use(&self, offset: u64, length: u64) -> Use {
        Use {
            engine: self.engine.clone(),
            place: (self.file.id, offset, length),
            held: None,
        }
    }

    fn wait_unused(&self, py: Python<'_>, offset: u64, length: u64) {
        py.detach(|| self.engine.users.wait_unused(self.file.id, offset, length));
    }

    fn in_use(&self, offset: u64, length: u64) -> bool {
        self.engine.users.in_use(self.file.id, offset, length)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.engine.close_file(self.file.id));
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = &self.file.counters;
        let dict = PyDict::new(py);
        dict.set_item("reads", counters.reads.load(Relaxed))?;
        dict.set_item("writes", counters.writes.load(Relaxed))?;
        dict.set_item("fixed", counters.fixed.load(Relaxed))?;
        dict.set_item("plain", counters.plain.load(Relaxed))?;
        dict.set_item("bounce_bytes", counters.bounced.load(Relaxed))?;
        dict.set_item("sent_bytes", counters.sent.load(Relaxed))?;
        dict.set_item("syncs", counters.syncs.load(Relaxed))?;
        Ok(dict)
    }
}

// -- exports -----------------------------------------------------------------------------------------------------

#[pyclass(frozen, module = "nbdserver._engine")]
struct Export {
    export: Arc<export::Export>,
}

/// A request of Python's own that runs on an export, until the end of a `with` block.
#[pyclass(module = "nbdserver._engine")]
struct Running {
    held: Option<export::Running>,
}

#[pymethods]
impl Running {
    fn __enter__(&self) {}

    #[pyo3(signature = (*_exception))]
    fn __exit__(&mut self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.held = None;
    }
}

/// Extents as Python says them: (length, target, offset, writable, transform, position, meters, log, log_position), the
/// target a file of the engine's, 0 for ZERO or 1 for CODE; the numbers are those of `Engine.add_transform`,
/// `Engine.meters` and `DirtyLog.number`.
fn pieces(leaves: &Bound<'_, PyAny>) -> PyResult<Vec<Piece>> {
    type Leaf<'py> = (u64, Bound<'py, PyAny>, u64, bool, u32, u64, u32, u32, u64);
    let mut pieces = Vec::new();
    for leaf in leaves.try_iter()? {
        let leaf: Leaf<'_> = leaf?.extract()?;
        let (length, target, offset, writable, transform, position, meters, log, log_position) =
            leaf;
        let target = if let Ok(file) = target.cast::<File>() {
            Target::File {
                file: file.get().file.id,
                offset,
                writable,
            }
        } else {
            match target.extract::<u8>()? {
                0 => Target::Zero,
                1 => Target::Code,
                other => return Err(PyValueError::new_err(format!("target {other}"))),
            }
        };
        let through = Through {
            transform,
            position,
            meters,
            log,
            log_position,
        };
        pieces.push(Piece {
            length,
            target,
            through,
        });
    }
    Ok(pieces)
}

/// A throttle: `nbdserver.extent.Meter`.
#[pyclass(frozen, module = "nbdserver._engine")]
struct Meter {
    meter: Arc<meter::Meter>,
}

#[pymethods]
impl Meter {
    fn charge(&self, py: Python<'_>, length: u64, write: bool) {
        py.detach(|| {
            while let Err(wait) = self.meter.take(length, write) {
                std::thread::sleep(wait);
            }
        });
    }
}

/// A dirty bitmap: `nbdserver.extent.DirtyBitmap`.
#[pyclass(frozen, module = "nbdserver._engine")]
struct DirtyBitmap {
    bitmap: Arc<dirty::Bitmap>,
}

#[pymethods]
impl DirtyBitmap {
    #[new]
    fn new(size: u64, granularity: u64) -> PyResult<DirtyBitmap> {
        if !granularity.is_power_of_two() {
            return Err(PyValueError::new_err("granularity is not a power of two"));
        }
        let bitmap = Arc::new(dirty::Bitmap::new(size, granularity));
        Ok(DirtyBitmap { bitmap })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.bitmap.size()
    }

    #[getter]
    fn granularity(&self) -> u64 {
        self.bitmap.granularity()
    }

    fn mark(&self, py: Python<'_>, offset: u64, length: u64) {
        py.detach(|| self.bitmap.mark(offset, length));
    }

    fn merge(&self, py: Python<'_>, other: &Bound<'_, DirtyBitmap>) {
        let other = other.get().bitmap.clone();
        py.detach(|| self.bitmap.merge(&other));
    }

    fn clear(&self, py: Python<'_>) {
        py.detach(|| self.bitmap.clear());
    }

    fn resize(&self, py: Python<'_>, size: u64) {
        py.detach(|| self.bitmap.resize(size));
    }

    fn count(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.bitmap.count())
    }

    fn runs(&self, py: Python<'_>, offset: u64, length: u64, count_max: usize) -> Vec<(u64, bool)> {
        py.detach(|| self.bitmap.runs(offset, length, count_max))
    }

    fn data<'py>(
        &self,
        py: Python<'py>,
        start: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        check_words(start, length)?;
        let data = py.detach(|| self.bitmap.data(start, length));
        Ok(PyBytes::new(py, &data))
    }

    fn load(&self, py: Python<'_>, start: u64, data: &[u8]) -> PyResult<()> {
        check_words(start, data.len())?;
        py.detach(|| self.bitmap.load(start, data));
        Ok(())
    }
}

fn check_words(start: u64, length: usize) -> PyResult<()> {
    if start.is_multiple_of(8) && length.is_multiple_of(8) {
        return Ok(());
    }
    Err(PyValueError::new_err("not a multiple of 8 bytes"))
}

/// A dirty log: `nbdserver.extent.DirtyLog`.
#[pyclass(frozen, module = "nbdserver._engine")]
struct DirtyLog {
    log: Arc<dirty::Log>,
    /// What extents say for it.
    #[pyo3(get)]
    number: u32,
}

#[pymethods]
impl DirtyLog {
    fn set(&self, py: Python<'_>, bitmaps: Vec<Bound<'_, DirtyBitmap>>) {
        let bitmaps = bitmaps.iter().map(|bitmap| bitmap.get().bitmap.clone());
        let bitmaps = bitmaps.collect();
        py.detach(|| self.log.set(bitmaps));
    }

    fn mark(&self, py: Python<'_>, offset: u64, length: u64) {
        py.detach(|| self.log.mark(offset, length));
    }
}

#[pymethods]
impl Export {
    #[getter]
    fn id(&self) -> u32 {
        self.export.id
    }

    #[getter]
    fn size(&self) -> u64 {
        self.export.size()
    }

    #[setter]
    fn set_size(&self, py: Python<'_>, size: u64) {
        py.detach(|| self.export.resize(size));
    }

    #[getter]
    fn writethrough(&self) -> bool {
        self.export.writethrough.load(Relaxed)
    }

    #[setter]
    fn set_writethrough(&self, writethrough: bool) {
        self.export.writethrough.store(writethrough, Relaxed);
    }

    #[getter]
    fn in_place(&self) -> bool {
        self.export.in_place.load(Relaxed)
    }

    #[setter]
    fn set_in_place(&self, in_place: bool) {
        self.export.in_place.store(in_place, Relaxed);
    }

    #[getter]
    fn is_draining(&self) -> bool {
        self.export.is_draining()
    }

    #[getter]
    fn sequence(&self) -> u64 {
        self.export.sequence()
    }

    fn fill(&self, sequence: u64, offset: u64, leaves: &Bound<'_, PyAny>) -> PyResult<bool> {
        let pieces = pieces(leaves)?;
        Ok(leaves
            .py()
            .detach(|| self.export.fill(sequence, offset, &pieces)))
    }

    #[pyo3(signature = (sequence, offset, words, *, file, unit, places, refused, zeroes, limit))]
    #[allow(clippy::too_many_arguments)] // they are keywords
    fn fill_table(
        &self,
        py: Python<'_>,
        sequence: u64,
        offset: u64,
        words: PyBuffer<u64>,
        file: &Bound<'_, File>,
        unit: u64,
        places: u64,
        refused: u64,
        zeroes: Vec<(u64, u64)>,
        limit: u64,
    ) -> PyResult<bool> {
        if !unit.is_power_of_two() || unit < 4 {
            return Err(PyValueError::new_err(
                "a unit is a power of two, at least 4",
            ));
        }
        let words = words.to_vec(py)?;
        let packing = Packing {
            unit,
            file: file.get().file.id,
            places,
            refused,
            zeroes,
            limit,
        };
        Ok(py.detach(|| self.export.fill_table(sequence, offset, &packing, &words)))
    }

    fn has_table(&self, offset: u64) -> bool {
        self.export.has_table(offset)
    }

    fn changed(&self, py: Python<'_>, offset: u64, length: u64) {
        py.detach(|| self.export.changed(offset, length));
    }

    fn clear(&self) {
        self.export.clear();
    }

    fn known(&self, offset: u64, length: u64, write: bool) -> Vec<(u64, bool)> {
        self.export.known(offset, length, write)
    }

    fn running(&self, py: Python<'_>, timeout: f64) -> PyResult<Option<Running>> {
        let timeout = seconds(timeout)?;
        let held = py.detach(|| self.export.enter_waiting(timeout));
        Ok(held.map(|held| Running { held: Some(held) }))
    }

    fn drain_begin(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        Ok(py.detach(|| self.export.drain_begin(timeout)))
    }

    fn drain_end(&self) {
        self.export.drain_end();
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = &self.export.counters;
        let dict = PyDict::new(py);
        dict.set_item("reads", counters.reads.load(Relaxed))?;
        dict.set_item("writes", counters.writes.load(Relaxed))?;
        dict.set_item("bytes_read", counters.bytes_read.load(Relaxed))?;
        dict.set_item("bytes_written", counters.bytes_written.load(Relaxed))?;
        dict.set_item("hits", counters.hits.load(Relaxed))?;
        dict.set_item("faults", counters.faults.load(Relaxed))?;
        dict.set_item("resolve_calls", counters.resolve_calls.load(Relaxed))?;
        dict.set_item("read_calls", counters.read_calls.load(Relaxed))?;
        dict.set_item("write_calls", counters.write_calls.load(Relaxed))?;
        dict.set_item("other_calls", counters.other_calls.load(Relaxed))?;
        dict.set_item("extents", self.export.extents())?;
        dict.set_item("packed", self.export.packed())?;
        dict.set_item("cache_bytes", self.export.cache_bytes())?;
        Ok(dict)
    }
}

// -- faults ------------------------------------------------------------------------------------------------------

/// A request that needs Python; see the stub.
#[pyclass(module = "nbdserver._engine")]
struct Fault {
    fault: fault::Fault,
    #[pyo3(get)]
    export: u32,
    /// The request's flags on the wire.
    #[pyo3(get)]
    flags: u16,
    start: u64,
}

#[pymethods]
impl Fault {
    #[getter]
    fn kind(&self) -> &'static str {
        match self.fault.step {
            Step::Resolve { .. } => "resolve",
            Step::Read { .. } => "read",
            Step::Write { .. } => "write",
            Step::Zero { .. } => "zero",
            Step::Trim { .. } => "trim",
            Step::Status { .. } => "status",
            Step::Flush => "flush",
        }
    }

    /// (offset, length) of the range that is wanted.
    #[getter]
    fn range(&self) -> (u64, u64) {
        match self.fault.step {
            Step::Resolve { offset, length, .. }
            | Step::Read { offset, length }
            | Step::Write { offset, length, .. }
            | Step::Zero { offset, length }
            | Step::Trim { offset, length }
            | Step::Status { offset, length } => (offset, length),
            Step::Flush => (0, 0),
        }
    }

    /// Whether what is to be written is mapped and writable, and must go through its layer all the same.
    #[getter]
    fn mapped(&self) -> bool {
        matches!(self.fault.step, Step::Write { mapped: true, .. })
    }

    #[getter]
    fn sequence(&self) -> u64 {
        match self.fault.step {
            Step::Resolve { sequence, .. } | Step::Write { sequence, .. } => sequence,
            _ => 0,
        }
    }

    #[getter]
    fn contexts(&self) -> Vec<(u32, String)> {
        let request = self.fault.request.as_ref();
        request
            .map(|request| request.contexts())
            .unwrap_or_default()
    }

    /// The request's memory for a range of the export: (slot, start, length) segments.
    fn segments(&self, offset: u64, length: u64) -> PyResult<Vec<(Slot, usize, usize)>> {
        let Some(request) = &self.fault.request else {
            return Err(PyRuntimeError::new_err("the fault has been answered"));
        };
        let start = (offset - self.start) as usize;
        let parts = request.vector.parts(start..start + length as usize);
        Ok(parts
            .map(|(slot, range)| (Slot { slot: slot.clone() }, range.start, range.len()))
            .collect())
    }

    /// Go on after the step, of which `length` bytes are done. True: another step is wanted.
    fn done(&mut self, py: Python<'_>, length: u64) -> bool {
        let fault = &mut self.fault;
        py.detach(|| {
            fault.stepped(length);
            fault.run()
        })
    }

    /// Go on after extents were entered. True: another step is wanted.
    fn again(&mut self, py: Python<'_>) -> bool {
        let fault = &mut self.fault;
        py.detach(|| fault.run())
    }

    fn fail(&mut self, errno: i32, message: &Bound<'_, PyString>) {
        // A message may quote a file name, which need not be UTF-8.
        let message = message.to_string_lossy().into_owned();
        self.fault.fail(Failure { errno, message });
    }

    fn status(&mut self, contexts: Vec<(u32, Vec<(u64, u32)>)>) {
        self.fault.status(contexts);
    }
}

// -- TLS ---------------------------------------------------------------------------------------------------------

/// What connections begin TLS with; see the stub.
#[pyclass(frozen, module = "nbdserver._engine")]
struct TlsContext {
    context: openssl::ssl::SslContext,
}

#[pymethods]
impl TlsContext {
    #[new]
    #[pyo3(signature = (*, certificate=None, key=None, authority=None, revoked=None, keys=None))]
    fn new(
        certificate: Option<String>,
        key: Option<String>,
        authority: Option<String>,
        revoked: Option<String>,
        keys: Option<HashMap<String, Vec<u8>>>,
    ) -> PyResult<TlsContext> {
        let settings = tls::Settings {
            certificate,
            key,
            authority,
            revoked,
            keys: keys.unwrap_or_default(),
        };
        let context = tls::context(settings).map_err(PyValueError::new_err)?;
        Ok(TlsContext { context })
    }
}

// -- handshakes --------------------------------------------------------------------------------------------------

/// A connection, for as long as one likes; see the stub.
#[pyclass(frozen, module = "nbdserver._engine")]
struct Client {
    client: Arc<client::Client>,
}

#[pymethods]
impl Client {
    #[getter]
    fn peer(&self) -> String {
        self.client.peer.to_string()
    }

    /// The listener that it came by.
    #[getter]
    fn listener(&self) -> Option<u32> {
        self.client.listener
    }

    /// Its address, where it came by TCP.
    #[getter]
    fn address(&self) -> Option<String> {
        match &self.client.peer {
            Peer::Address(address) => Some(address.ip().to_string()),
            _ => None,
        }
    }

    /// Its context id, where it came by vsock.
    #[getter]
    fn machine(&self) -> Option<u32> {
        match &self.client.peer {
            Peer::Machine { cid, .. } => Some(*cid),
            _ => None,
        }
    }

    /// Its process, user and groups, where it came by a Unix socket.
    #[getter]
    fn process(&self) -> Option<(i32, u32, Vec<u32>)> {
        match &self.client.peer {
            Peer::Process { pid, uid, groups } => Some((*pid, *uid, groups.clone())),
            _ => None,
        }
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = &self.client.counters;
        let dict = PyDict::new(py);
        dict.set_item("requests", counters.requests.load(Relaxed))?;
        dict.set_item("bytes_read", counters.bytes_read.load(Relaxed))?;
        dict.set_item("bytes_written", counters.bytes_written.load(Relaxed))?;
        Ok(dict)
    }

    fn disconnect(&self) {
        self.client.disconnect();
    }
}

/// Something that a connection in its handshake has sent; see the stub.
#[pyclass(frozen, module = "nbdserver._engine")]
struct Event {
    event: handshake::Event,
    worker: usize,
}

#[pymethods]
impl Event {
    /// Unlike any other connection's, ever.
    #[getter]
    fn connection(&self) -> (usize, u64) {
        (self.worker, self.event.connection)
    }

    #[getter]
    fn kind(&self) -> &'static str {
        match self.event.said {
            Said::Open(_) => "open",
            Said::Flags(_) => "flags",
            Said::Option { .. } => "option",
            Said::Oversized { .. } => "oversized",
            Said::Secured(_) => "secured",
            Said::Insecure(_) => "insecure",
            Said::Full(_) => "full",
            Said::Closed { .. } => "closed",
        }
    }

    /// Who has connected.
    #[getter]
    fn client(&self) -> Option<Client> {
        match &self.event.said {
            Said::Open(client) => Some(Client {
                client: client.clone(),
            }),
            _ => None,
        }
    }

    /// The client's flags, or the option's number.
    #[getter]
    fn code(&self) -> u32 {
        match self.event.said {
            Said::Flags(code) | Said::Option { code, .. } | Said::Oversized { code, .. } => code,
            _ => 0,
        }
    }

    /// The option's data.
    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        match &self.event.said {
            Said::Option { data, .. } => PyBytes::new(py, data),
            _ => PyBytes::new(py, &[]),
        }
    }

    /// The length of the option's data, also where that was thrown away.
    #[getter]
    fn length(&self) -> usize {
        match &self.event.said {
            Said::Option { data, .. } => data.len(),
            Said::Oversized { length, .. } => *length as usize,
            _ => 0,
        }
    }

    /// Who a client with TLS is: (subject, identity, cipher).
    #[getter]
    fn secured(&self) -> Option<(Option<&str>, Option<&str>, &str)> {
        match &self.event.said {
            Said::Secured(peer) => Some((
                peer.subject.as_deref(),
                peer.identity.as_deref(),
                &peer.cipher,
            )),
            _ => None,
        }
    }

    /// Why TLS could not begin, or what a client was refused for that was one too many.
    #[getter]
    fn reason(&self) -> Option<&str> {
        match &self.event.said {
            Said::Insecure(why) | Said::Full(why) => Some(why),
            _ => None,
        }
    }

    fn greet(&self) {
        self.event.act(Action::Greet);
    }

    fn start_tls(&self, data: &[u8], context: &Bound<'_, TlsContext>) {
        self.event.act(Action::StartTls {
            data: data.to_vec(),
            context: context.get().context.clone(),
        });
    }

    fn next(&self, data: &[u8]) {
        self.event.act(Action::Next {
            data: data.to_vec(),
        });
    }

    fn begin(
        &self,
        data: &[u8],
        export: &Bound<'_, Export>,
        style: &str,
        contexts: Vec<(u32, String)>,
        payload_max: u32,
        block_min: u32,
    ) -> PyResult<()> {
        if payload_max > wire::PAYLOAD_MAX {
            return Err(PyValueError::new_err("longer than any payload"));
        }
        let export = export.get().export.clone();
        let style = match style {
            "simple" => Style::Simple,
            "structured" => Style::Structured,
            "extended" => Style::Extended,
            _ => return Err(PyValueError::new_err("no such style")),
        };
        self.event.act(Action::Begin {
            data: data.to_vec(),
            export,
            style,
            contexts,
            payload_max,
            block_min,
        });
        Ok(())
    }

    fn end(&self, data: &[u8]) {
        self.event.act(Action::End {
            data: data.to_vec(),
        });
    }
}

// -- the engine --------------------------------------------------------------------------------------------------

/// `Limits` by their names, times in seconds; no idle_timeout: there is none.
fn limits_of(given: &Bound<'_, PyDict>) -> PyResult<Limits> {
    fn take<'py, T: FromPyObjectOwned<'py>>(given: &Bound<'py, PyDict>, key: &str) -> PyResult<T> {
        let value = given.get_item(key)?;
        let value = value.ok_or_else(|| PyValueError::new_err(format!("no {key}")))?;
        value.extract().map_err(Into::into)
    }
    let idle: Option<f64> = take(given, "idle_timeout")?;
    Ok(Limits {
        connections: take(given, "connections")?,
        peer_connections: take(given, "connections_per_peer")?,
        requests: take(given, "requests_per_connection")?,
        memory: take(given, "memory_per_connection")?,
        replies: take(given, "reply_memory")?,
        handshake: seconds(take(given, "handshake_timeout")?)?,
        idle: idle.map(seconds).transpose()?,
    })
}

#[pyclass(frozen, weakref, module = "nbdserver._engine")]
struct Engine {
    engine: Arc<engine::Engine>,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (*, workers, pool, backend, fault_threads, limits, record=None))]
    fn new(
        workers: usize,
        pool: usize,
        backend: &str,
        fault_threads: usize,
        limits: &Bound<'_, PyDict>,
        record: Option<String>,
    ) -> PyResult<Engine> {
        let backend = match backend {
            "auto" => Backend::Auto,
            "io_uring" => Backend::IoUring,
            "threads" => Backend::Threads,
            other => return Err(PyValueError::new_err(format!("no backend {other:?}"))),
        };
        if workers == 0 || fault_threads == 0 {
            return Err(PyValueError::new_err(
                "workers and fault_threads must be at least 1",
            ));
        }
        let limits = limits_of(limits)?;
        let settings = Settings {
            workers,
            pool,
            backend,
            fault_threads,
            limits,
            record,
        };
        let engine = engine::Engine::new(&settings).map_err(|error| PyOSError::new_err(error.0))?;
        Ok(Engine { engine })
    }

    #[getter]
    fn backend(&self) -> &'static str {
        if self.engine.refused.is_some() {
            "threads"
        } else {
            "io_uring"
        }
    }

    /// Why the backend is "threads", or None.
    #[getter]
    fn refused(&self) -> Option<String> {
        self.engine.refused.clone()
    }

    #[getter]
    fn connections(&self) -> usize {
        self.engine.connections()
    }

    #[getter]
    fn pool_free(&self) -> usize {
        self.engine.pool.free_bytes()
    }

    #[getter]
    fn pool_size(&self) -> usize {
        self.engine.pool.size()
    }

    /// (address, length) of the registered part of the pool; nothing is registered where the length is 0.
    #[getter]
    fn pool_region(&self) -> (usize, usize) {
        let (address, _) = self.engine.pool.as_region();
        (address.addr(), self.engine.pool.registered())
    }

    /// The kind of pages that the pool is on, and how many bytes are on huge ones now.
    #[getter]
    fn pool_pages(&self) -> (&'static str, usize) {
        self.engine.pool.page_kind()
    }

    /// The errno with which the kernel refused to register all of the pool, or None.
    #[getter]
    fn unregistered(&self) -> Option<i32> {
        self.engine.unregistered.map(Errno::raw_os_error)
    }

    fn operations<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let ops = &self.engine.ops;
        let dict = PyDict::new(py);
        dict.set_item("read", ops.read.load(Relaxed))?;
        dict.set_item("write", ops.write.load(Relaxed))?;
        dict.set_item("read_fixed", ops.read_fixed.load(Relaxed))?;
        dict.set_item("write_fixed", ops.write_fixed.load(Relaxed))?;
        Ok(dict)
    }

    /// The number of a new transform, for extents.
    fn add_transform(&self, cipher: &str, key: &[u8], sector_size: usize) -> PyResult<u32> {
        let transform = transform::Transform::new(cipher, key, sector_size)
            .ok_or_else(|| PyValueError::new_err(format!("no transform {cipher:?}")))?;
        Ok(self.engine.effects.add_transform(transform))
    }

    /// A meter of six (average, max, length) limits: bps total, read, write; iops total, read, write.
    fn new_meter(&self, limits: [(f64, f64, f64); 6], iops_size: u64) -> Meter {
        let limits = limits.map(|(average, max, length)| meter::Limit {
            average,
            max,
            length,
        });
        Meter {
            meter: Arc::new(meter::Meter::new(limits, iops_size)),
        }
    }

    /// The number of a set of meters, for extents.
    fn meters(&self, set: Vec<Bound<'_, Meter>>) -> u32 {
        let set: Vec<_> = set.iter().map(|meter| meter.get().meter.clone()).collect();
        self.engine.effects.intern_meters(&set)
    }

    fn new_dirty_log(&self) -> DirtyLog {
        let log = Arc::new(dirty::Log::default());
        let number = self.engine.effects.add_log(log.clone());
        DirtyLog { log, number }
    }

    #[pyo3(signature = (fd, name, read_only, limits, *, direct=false, r#unsafe=false, threads=false))]
    #[allow(clippy::too_many_arguments)] // they are keywords
    fn open_file(
        &self,
        fd: RawFd,
        name: OsString,
        read_only: bool,
        limits: Bound<'_, PyAny>,
        direct: bool,
        r#unsafe: bool,
        threads: bool,
    ) -> PyResult<File> {
        let fd = owned(fd);
        let transfer_max = match limits.getattr("max_transfer")?.extract()? {
            0 => usize::MAX,
            max => max,
        };
        let mode = Mode {
            direct,
            unsafe_: r#unsafe,
            threads,
            transfer_max,
        };
        // File names are bytes; the engine only ever shows them.
        let name = name.to_string_lossy().into_owned();
        let file = self
            .engine
            .open_file(fd, name, read_only, mode)
            .map_err(os_error)?;
        Ok(File {
            engine: self.engine.clone(),
            file,
            limits: limits.unbind(),
        })
    }

    fn new_export(&self, size: u64, read_only: bool) -> Export {
        let export = self.engine.new_export(size, read_only);
        Export { export }
    }

    fn allocate(&self, length: usize) -> PyResult<Vec<Slot>> {
        let slots = self.engine.pool.allocate_bounce(length);
        let slots = slots.ok_or_else(|| os_error(Errno::NOMEM))?;
        Ok(slots
            .into_iter()
            .map(|slot| Slot {
                slot: Arc::new(slot),
            })
            .collect())
    }

    fn start(&self) -> PyResult<()> {
        self.engine
            .start()
            .map_err(|error| PyOSError::new_err(error.0))
    }

    fn listen(&self, listener: RawFd) -> PyResult<u32> {
        let number = self.engine.listen(owned(listener));
        number.ok_or_else(|| PyRuntimeError::new_err("the engine is not running"))
    }

    fn connected(&self, socket: RawFd) -> PyResult<()> {
        if self.engine.connected(owned(socket)) {
            return Ok(());
        }
        Err(PyRuntimeError::new_err("the engine is not running"))
    }

    fn set_limits(&self, limits: &Bound<'_, PyDict>) -> PyResult<()> {
        self.engine.set_limits(limits_of(limits)?);
        Ok(())
    }

    /// Ordinary memory that requests and replies hold.
    #[getter]
    fn reply_memory(&self) -> usize {
        self.engine.holding.bytes()
    }

    /// Connections that were one too many.
    #[getter]
    fn turned_away(&self) -> u64 {
        self.engine.turned_away.load(Relaxed)
    }

    fn unlisten(&self, py: Python<'_>, number: u32) {
        py.detach(|| self.engine.unlisten(number));
    }

    fn stop(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        Ok(py.detach(|| self.engine.stop(timeout)))
    }

    fn take_fault(&self, py: Python<'_>) -> Option<Fault> {
        let fault = py.detach(|| self.engine.faults.take())?;
        let request = fault.request.as_ref()?;
        let (export, flags) = (request.export.id, request.header.flags);
        let start = request.header.offset;
        Some(Fault {
            fault,
            export,
            flags,
            start,
        })
    }

    fn take_event(&self, py: Python<'_>) -> Option<Event> {
        let event = py.detach(|| self.engine.handshakes.pop())?;
        let inboxes = &self.engine.inboxes;
        let worker = inboxes
            .iter()
            .position(|inbox| Arc::ptr_eq(inbox, &event.inbox))?;
        Some(Event { event, worker })
    }
}

// -- stop points ---------------------------------------------------------------------------------------------------

/// A named point in the engine at which the next thread that passes is held: for deterministic tests.
#[pyclass(frozen, module = "nbdserver._engine")]
struct Stop {
    stop: points::Stop,
}

#[pymethods]
impl Stop {
    fn wait_reached(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        Ok(py.detach(|| self.stop.wait_reached(timeout)))
    }

    fn release(&self) {
        self.stop.release();
    }
}

#[pyfunction]
#[pyo3(signature = (name, nth=1))]
fn stop_at(name: String, nth: usize) -> Stop {
    Stop {
        stop: points::arm(&name, nth),
    }
}

#[pyfunction]
fn panic_at(name: String) -> Stop {
    Stop {
        stop: points::arm_panic(&name),
    }
}

#[pymodule]
fn _engine(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Engine>()?;
    module.add_class::<File>()?;
    module.add_class::<Use>()?;
    module.add_class::<Meter>()?;
    module.add_class::<Export>()?;
    module.add_class::<DirtyBitmap>()?;
    module.add_class::<DirtyLog>()?;
    module.add_class::<Running>()?;
    module.add_class::<Fault>()?;
    module.add_class::<Client>()?;
    module.add_class::<Event>()?;
    module.add_class::<TlsContext>()?;
    module.add_class::<Slot>()?;
    module.add_class::<Stop>()?;
    module.add_function(wrap_pyfunction!(stop_at, module)?)?;
    module.add_function(wrap_pyfunction!(panic_at, module)?)?;
    Ok(())
}
