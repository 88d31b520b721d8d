//! Who is at the other end of a connection, as far as the system vouches for it; and how many connections each has.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, getpeername};

/// Bytes of the prefix that an IPv6 host commonly has to itself: a /64.
const PREFIX: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// TCP; an IPv4 address that was mapped into IPv6 is an IPv4 address.
    Address(SocketAddr),
    /// A Unix socket: who connected, when it did.
    Process {
        pid: i32,
        uid: u32,
        /// The process's group, and the others that it was in.
        groups: Vec<u32>,
    },
    /// A virtual machine (vsock).
    Machine {
        cid: u32,
        port: u32,
    },
    Unknown,
}

/// What connections are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Origin {
    V4([u8; 4]),
    V6([u8; PREFIX]),
    User(u32),
    Machine(u32),
    Unknown,
}

impl Peer {
    /// The other end of a connected socket.
    pub fn of(socket: &(impl AsFd + AsRawFd)) -> Peer {
        let Ok(Some(name)) = getpeername(socket) else {
            return Peer::Unknown;
        };
        match name.address_family() {
            AddressFamily::INET | AddressFamily::INET6 => match SocketAddr::try_from(name) {
                Ok(address) => {
                    Peer::Address(SocketAddr::new(address.ip().to_canonical(), address.port()))
                }
                Err(_) => Peer::Unknown,
            },
            AddressFamily::UNIX => process(socket).unwrap_or(Peer::Unknown),
            AddressFamily::VSOCK if name.addr_len() as usize >= size_of::<libc::sockaddr_vm>() => {
                // SAFETY: the kernel has written a whole sockaddr_vm there, as family and length say.
                let name = unsafe { &*name.as_ptr().cast::<libc::sockaddr_vm>() };
                Peer::Machine {
                    cid: name.svm_cid,
                    port: name.svm_port,
                }
            }
            _ => Peer::Unknown,
        }
    }

    fn origin(&self) -> Origin {
        match self {
            Peer::Address(address) => match address.ip() {
                IpAddr::V4(ip) => Origin::V4(ip.octets()),
                IpAddr::V6(ip) => {
                    let mut prefix = [0; PREFIX];
                    prefix.copy_from_slice(&ip.octets()[..PREFIX]);
                    Origin::V6(prefix)
                }
            },
            Peer::Process { uid, .. } => Origin::User(*uid),
            Peer::Machine { cid, .. } => Origin::Machine(*cid),
            Peer::Unknown => Origin::Unknown,
        }
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Address(address) => write!(out, "{address}"),
            Peer::Process { pid, uid, .. } => write!(out, "unix (user {uid}, process {pid})"),
            Peer::Machine { cid, port } => write!(out, "vsock {cid}:{port}"),
            Peer::Unknown => write!(out, "unknown"),
        }
    }
}

/// Who connected a Unix socket. (Not by rustix, whose process ids are never 0: those of other namespaces are.)
fn process(socket: &impl AsRawFd) -> Option<Peer> {
    let mut credentials = [0; 3]; // struct ucred
    option(socket, libc::SO_PEERCRED, &mut credentials).ok()?;
    let [pid, uid, gid] = credentials;
    let mut groups = vec![gid];
    groups.extend(other_groups(socket));
    Some(Peer::Process {
        pid: pid as i32,
        uid,
        groups,
    })
}

/// The supplementary groups of who connected; none where the kernel does not tell.
fn other_groups(socket: &impl AsRawFd) -> Vec<u32> {
    let mut groups = Vec::new();
    loop {
        match option(socket, libc::SO_PEERGROUPS, &mut groups) {
            Ok(count) => {
                groups.truncate(count);
                return groups;
            }
            Err(count) if count > groups.len() => groups.resize(count, 0),
            Err(_) => return Vec::new(),
        }
    }
}

/// Read an option of a socket that is a row of 32-bit numbers; how many there are. Err: how many there would be, as far as
/// the kernel says.
fn option(socket: &impl AsRawFd, name: libc::c_int, numbers: &mut [u32]) -> Result<usize, usize> {
    let mut length = size_of_val(numbers) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `numbers`, which has as many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            numbers.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    let count = length as usize / size_of::<u32>();
    if result == 0 { Ok(count) } else { Err(count) }
}

/// The connections that there are: in all, and of each peer.
#[derive(Default)]
pub struct Crowd {
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    total: usize,
    of: HashMap<Origin, usize>,
}

/// Counts as a connection for as long as it lives: until the connection's last request has ended, and Python knows of its
/// end. So a client that comes and goes cannot pile up what it leaves behind.
pub struct Admitted {
    crowd: Arc<Crowd>,
    origin: Origin,
}

/// Why one more connection is one too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    InAll,
    OfThisPeer,
}

impl Crowd {
    pub fn admit(
        self: &Arc<Self>,
        peer: &Peer,
        total_max: usize,
        peer_max: usize,
    ) -> Result<Admitted, Full> {
        let origin = peer.origin();
        let mut counts = self.counts.lock().unwrap();
        if counts.total >= total_max {
            return Err(Full::InAll);
        }
        let of_this = counts.of.entry(origin).or_default();
        if *of_this >= peer_max {
            return Err(Full::OfThisPeer);
        }
        *of_this += 1;
        counts.total += 1;
        Ok(Admitted {
            crowd: self.clone(),
            origin,
        })
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut counts = self.crowd.counts.lock().unwrap();
        counts.total -= 1;
        let of_this = counts.of.get_mut(&self.origin).expect("it was counted");
        *of_this -= 1;
        if *of_this == 0 {
            counts.of.remove(&self.origin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> Peer {
        Peer::Address(SocketAddr::new(address.parse().unwrap(), 1))
    }

    #[test]
    fn connections_are_counted_in_all_and_of_each_peer() {
        let crowd = Arc::new(Crowd::default());
        let first = crowd.admit(&at("10.0.0.1"), 3, 1).ok().unwrap();
        assert_eq!(
            crowd.admit(&at("10.0.0.1"), 3, 1).err(),
            Some(Full::OfThisPeer)
        );
        let _second = crowd.admit(&at("10.0.0.2"), 3, 1).ok().unwrap();
        let _third = crowd.admit(&at("10.0.0.3"), 3, 1).ok().unwrap();
        assert_eq!(crowd.admit(&at("10.0.0.4"), 3, 1).err(), Some(Full::InAll));
        drop(first);
        assert!(crowd.admit(&at("10.0.0.1"), 3, 1).is_ok());
        assert_eq!(crowd.counts.lock().unwrap().of.len(), 2);
    }

    #[test]
    fn an_ipv6_host_may_have_a_whole_prefix() {
        let crowd = Arc::new(Crowd::default());
        let _first = crowd.admit(&at("2001:db8::1"), 9, 1).ok().unwrap();
        assert!(crowd.admit(&at("2001:db8::2"), 9, 1).is_err());
        assert!(crowd.admit(&at("2001:db8:0:1::2"), 9, 1).is_ok());
    }
}
