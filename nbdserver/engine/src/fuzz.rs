//! Whatever a client sends in the transmission phase is parsed, judged and answered, in bounds: a mutator with a corpus.
//!
//! ```text
//! corpus ──> mutated ──> parse_request ──> judge ──> Run: an answer is encoded, and decoded again
//!   ^ sessions of each style (tests/protocol/corpus)  └─> Error: the same
//! ```
//!
//! `NBDSERVER_FUZZ_INPUTS` says how many inputs (a short run by default), `NBDSERVER_SEED` with which seed. A panic names the
//! input, which the same seed gives again.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use crate::random::Random;
use crate::wire::{
    self, Header, Question, Rules, Style, Verdict, chunk, command, error, judge,
    parse_named_contexts, parse_request,
};

/// Counts what each thread has allocated and not freed.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.set(HELD.get() + layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

const INPUTS: u64 = 100_000;
/// Longer inputs have nothing more to say.
const INPUT_MAX: usize = 4096;
const SIZES: [u64; 5] = [0, 1 << 20, (1 << 32) + 1, 1 << 43, (1 << 63) - 1];
/// Numbers near which lengths and offsets are judged otherwise.
const EDGES: [u64; 12] = [
    0,
    1,
    511,
    4096,
    1 << 20,
    (1 << 25) - 1,
    (1 << 25) + 1,
    (1 << 32) - 1,
    1 << 32,
    1 << 63,
    u64::MAX - 4095,
    u64::MAX,
];

#[test]
fn whatever_is_sent_is_answered_in_bounds() {
    let number = |name, usual| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse().ok())
            .unwrap_or(usual)
    };
    let (inputs, seed) = (
        number("NBDSERVER_FUZZ_INPUTS", INPUTS),
        number("NBDSERVER_SEED", 1),
    );
    let corpus = corpus();
    for (style, session) in &corpus {
        assert!(
            session_requests(*style, session) >= 5,
            "the corpus has good sessions"
        );
    }
    let mut random = Random(seed);
    let mut requests = 0;
    let before = HELD.get();
    for _ in 0..inputs {
        let (style, session) = mutated(&corpus, &mut random);
        requests += session_requests_of(style, &session, &rules(style, &mut random));
    }
    assert!(
        requests > inputs / 2,
        "most inputs have requests in them: {requests}"
    );
    assert_eq!(
        HELD.get(),
        before,
        "nothing is kept from one input to the next"
    );
    println!("{inputs} inputs, {requests} requests");
}

/// The sessions in the corpus, by the styles that their files are named after.
fn corpus() -> Vec<(Style, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/protocol/corpus");
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .expect("the corpus")
        .map(|entry| entry.expect("a file").path())
        .collect();
    files.sort();
    let of_style = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let style = match name.split('-').next()? {
            "simple" => Style::Simple,
            "structured" => Style::Structured,
            "extended" => Style::Extended,
            _ => return None,
        };
        Some((style, std::fs::read(path).expect("a readable file")))
    };
    files.iter().filter_map(|path| of_style(path)).collect()
}

fn rules(style: Style, random: &mut Random) -> Rules {
    Rules {
        size: SIZES[random.below(SIZES.len() as u64) as usize],
        read_only: random.one_in(4),
        payload_max: if random.one_in(4) { 4096 } else { 32 << 20 },
        block_min: if random.one_in(4) { 512 } else { 1 },
        style,
        block_status: style != Style::Simple && !random.one_in(4),
        stopping: random.one_in(16),
    }
}

// -- mutation ------------------------------------------------------------------------------------------------------

fn mutated(corpus: &[(Style, Vec<u8>)], random: &mut Random) -> (Style, Vec<u8>) {
    let (style, session) = &corpus[random.below(corpus.len() as u64) as usize];
    let mut session = session.clone();
    for _ in 0..random.below(6) {
        mutate(&mut session, corpus, random);
    }
    session.truncate(INPUT_MAX);
    (*style, session)
}

fn mutate(session: &mut Vec<u8>, corpus: &[(Style, Vec<u8>)], random: &mut Random) {
    if session.is_empty() {
        return;
    }
    let at = random.below(session.len() as u64) as usize;
    let end = (at + 1 + random.below(32) as usize).min(session.len());
    match random.below(8) {
        0 => session[at] ^= 1 << random.below(8),
        1 => session[at] = random.next() as u8,
        2 => session.truncate(at),
        3 => drop(session.drain(at..end)),
        4 => {
            let again = session[at..end].to_vec();
            session.splice(at..at, again);
        }
        5 => {
            let (_, other) = &corpus[random.below(corpus.len() as u64) as usize];
            let from = random.below(other.len() as u64) as usize;
            session.truncate(at);
            session.extend_from_slice(&other[from..]);
        }
        // A number of 16, 32 or 64 bits becomes one that matters.
        width => {
            let size = [2, 4, 8][random.below(3) as usize];
            let place = if width == 6 { at & !3 } else { at };
            let edge = EDGES[random.below(EDGES.len() as u64) as usize].to_be_bytes();
            if let Some(field) = session.get_mut(place..place + size) {
                field.copy_from_slice(&edge[8 - size..]);
            }
        }
    }
}

// -- what a worker does, without sockets ---------------------------------------------------------------------------

/// The requests that a good session has.
fn session_requests(style: Style, session: &[u8]) -> u64 {
    let rules = Rules {
        size: 1 << 43,
        read_only: false,
        payload_max: 32 << 20,
        block_min: 1,
        style,
        block_status: style != Style::Simple,
        stopping: false,
    };
    session_requests_of(style, session, &rules)
}

/// Go through a session to its end, or to what ends the connection; how many requests it had.
fn session_requests_of(style: Style, session: &[u8], rules: &Rules) -> u64 {
    let contexts = [(1, "base:allocation".to_owned()), (7, "x:y".to_owned())];
    let (mut rest, mut requests) = (session, 0);
    while let Ok(Some(mut header)) = parse_request(rest, style) {
        requests += 1;
        rest = &rest[style.request_size()..];
        let mut named = None;
        if wire::names_contexts(&header) {
            let Some(payload) = rest.get(..header.payload as usize) else {
                break;
            };
            if let Some((length, ids)) = parse_named_contexts(payload, &contexts) {
                assert!(!ids.is_empty() && ids.len() <= contexts.len());
                rest = &rest[payload.len()..];
                (header.length, header.payload) = (length, 0);
                named = Some(ids);
            }
        }
        let failure = match judge(&header, rules) {
            Verdict::Fatal(why) => {
                assert!(header.payload > u64::from(rules.payload_max) && !why.is_empty());
                break;
            }
            Verdict::Run if header.command == command::DISC => break,
            Verdict::Run => {
                check_run(&header, rules);
                None
            }
            Verdict::Error(number, why) => {
                assert_eq!(header.payload, 0, "it would be taken for requests");
                Some((number, why))
            }
            Verdict::ErrorDrain(number, why) => {
                assert!(header.payload > 0);
                Some((number, why))
            }
        };
        check_answer(style, &header, failure, named.as_deref());
        let payload = usize::try_from(header.payload).expect("what fits in memory");
        match rest.get(payload..) {
            Some(after) => rest = after,
            None => break,
        }
    }
    requests
}

/// What may run is within the disk, and within what was negotiated.
fn check_run(header: &Header, rules: &Rules) {
    let end = header
        .offset
        .checked_add(header.length)
        .expect("no overflow");
    assert!(end <= rules.size && !rules.stopping);
    let block = u64::from(rules.block_min);
    assert!((header.offset | header.length).is_multiple_of(block));
    let changes = matches!(
        header.command,
        command::WRITE | command::TRIM | command::WRITE_ZEROES
    );
    assert!(!(changes && rules.read_only));
    if matches!(header.command, command::READ | command::WRITE) {
        assert!(header.length <= u64::from(rules.payload_max));
    }
    if header.command == command::BLOCK_STATUS {
        assert!(rules.block_status && header.length > 0);
    }
}

/// An answer is as long as its headers say, and repeats the cookie.
fn check_answer(
    style: Style,
    header: &Header,
    failure: Option<(u32, &'static str)>,
    named: Option<&[u32]>,
) {
    let mut out = Vec::new();
    if style == Style::Simple {
        wire::simple_reply(
            &mut out,
            failure.map_or(0, |(number, _)| number),
            header.cookie,
        );
        assert_eq!(out.len(), 16);
        assert_eq!(out[8..], header.cookie.to_be_bytes());
        return;
    }
    let question = Question {
        extended: style == Style::Extended,
        cookie: header.cookie,
        offset: header.offset,
    };
    match (failure, header.command) {
        (Some((number, why)), _) => question.error(&mut out, chunk::FLAG_DONE, number, why),
        (None, command::BLOCK_STATUS) => {
            let extents = [(header.length, 3), (u64::MAX >> 1, 0)];
            for id in named.unwrap_or(&[1]) {
                question.block_status(&mut out, chunk::FLAG_DONE, *id, &extents);
            }
        }
        (None, command::READ) if header.length > 0 => {
            question.hole(
                &mut out,
                chunk::FLAG_DONE,
                header.offset,
                header.length as u32,
            );
        }
        _ => question.none(&mut out),
    }
    check_chunks(style, header, &out);
}

fn check_chunks(style: Style, header: &Header, mut out: &[u8]) {
    let (size, length_at) = if style == Style::Extended {
        (32, 28)
    } else {
        (20, 16)
    };
    while !out.is_empty() {
        assert_eq!(out[8..16], header.cookie.to_be_bytes());
        if style == Style::Extended {
            assert_eq!(out[16..24], header.offset.to_be_bytes());
            assert_eq!(out[24..28], [0; 4], "replies have 32 bits of length");
        }
        let kind = u16::from_be_bytes([out[6], out[7]]);
        let length = u32::from_be_bytes(out[length_at..length_at + 4].try_into().expect("four"));
        let payload = &out[size..size + length as usize];
        if kind == chunk::ERROR {
            assert_ne!(payload[..4], [0; 4]);
            assert!(payload[..4] != error::ENOTSUP.to_be_bytes());
        }
        if kind == chunk::BLOCK_STATUS {
            assert!(payload.len() > 4 && (payload.len() - 4).is_multiple_of(8));
            let (extents, _) = payload[4..].as_chunks::<8>();
            assert!(
                extents.iter().all(|extent| extent[..4] != [0; 4]),
                "an extent of nothing"
            );
        }
        out = &out[size + length as usize..];
    }
}
