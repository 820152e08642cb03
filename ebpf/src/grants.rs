//! The maps of grants and of what sockets remember, and the only code that touches them. All objects of a host
//! share them: those of the interfaces, and those of the cgroups.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type},
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_listener_sock, bpf_sk_storage_get, bpf_skb_ancestor_cgroup_id,
    },
    macros::{btf_map, map},
    maps::{Array, HashMap},
};
use qjump_ebpf::{
    Level,
    grant::{Grant, MAX_DEPTH, MAX_GRANTS, MaybeLevel, SocketRecord},
};

/// Key: number of a cgroup. Value: its grant. Written by `qjump tag` and its like.
#[map(name = "qj_grants")]
static GRANTS: HashMap<u64, Grant> = HashMap::with_max_entries(MAX_GRANTS, BPF_F_NO_PREALLOC);

/// Key: 0. Value: number of the last change of the grants, at least 1 if there ever was one. Written after the
/// change, so that what is found in a generation is never older than it.
#[map(name = "qj_generation")]
static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

/// Key: a socket. Value: what it remembers. Written by the programs, and by whoever adopts a socket.
#[btf_map(name = "qj_sockets")]
static SOCKETS: SocketMap = SocketMap::new();

/// `SK_STORAGE` with `BPF_F_CLONE`, which aya's type cannot have: an accepted connection begins with the record of
/// its listener. The fields are the BTF of the definition, and no data.
#[repr(C)]
struct SocketMap {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const SocketRecord,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the pointers are never read; the loader replaces the whole by a map.
unsafe impl Sync for SocketMap {}

impl SocketMap {
    const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    /// The record of `socket`, a socket or a context that stands for one; null if it has none.
    ///
    /// # Safety
    /// `socket` must come from the kernel; the verifier checks that.
    #[inline(always)]
    unsafe fn get<T>(&self, socket: *mut T, flags: u32) -> *mut SocketRecord {
        // SAFETY: as the caller says; with a null value, a new record is all zero.
        unsafe {
            bpf_sk_storage_get(ptr::from_ref(self).cast_mut().cast(), socket.cast(), ptr::null_mut(), flags.into())
        }
        .cast()
    }
}

/// The record of a socket that may have none.
#[inline(always)]
pub fn record<'a, T>(socket: *mut T) -> Option<&'a mut SocketRecord> {
    if socket.is_null() {
        return None;
    }
    // SAFETY: not null, and from the context. Records live as long as their socket, which outlives the program;
    // CPUs that write one at a time each write whole words.
    unsafe { SOCKETS.get(socket, 0).as_mut() }
}

/// The record of a socket; `None` if there is no memory for it, or it is no full socket.
#[inline(always)]
pub fn make_record<'a, T>(socket: *mut T) -> Option<&'a mut SocketRecord> {
    if socket.is_null() {
        return None;
    }
    // SAFETY: as in `record`.
    unsafe { SOCKETS.get(socket, BPF_SK_STORAGE_GET_F_CREATE).as_mut() }
}

/// The number of the last change of the grants.
#[inline(always)]
pub fn generation() -> u64 {
    // SAFETY: an aligned word in a map that lives as long as the program.
    GENERATION.get_ptr(0).map_or(0, |generation| unsafe { ptr::read_volatile(generation) })
}

/// A grant as the programs need it.
#[derive(Clone, Copy)]
pub struct Found {
    pub level: MaybeLevel,
    /// Bytes, or 0.
    pub send_buffer: u32,
}

impl Found {
    const NOTHING: Self = Self { level: MaybeLevel::NONE, send_buffer: 0 };

    /// Replaces what was found by the grant of `cgroup`, if it has one.
    #[inline(always)]
    fn or_nearer(self, cgroup: u64) -> Self {
        // SAFETY: a grant that is replaced meanwhile is read as it was or as it is; each field is one word.
        match unsafe { GRANTS.get(cgroup) } {
            Some(grant) => Self { level: MaybeLevel::from_number(grant.level), send_buffer: grant.send_buffer },
            None => self,
        }
    }
}

/// The nearest grant above, where `ancestor` names the cgroup at each depth and ends with 0.
#[inline(always)]
fn nearest(ancestor: impl Fn(i32) -> u64) -> Found {
    let mut found = Found::NOTHING;
    for depth in 0..=MAX_DEPTH as i32 {
        let cgroup = ancestor(depth);
        if cgroup == 0 {
            break;
        }
        found = found.or_nearer(cgroup);
    }
    found
}

/// The grant of the cgroup that the process at work is in: that of a socket that it makes.
#[inline(always)]
pub fn of_current_process() -> Found {
    // SAFETY: the helper has no preconditions.
    nearest(|depth| unsafe { bpf_get_current_ancestor_cgroup_id(depth) })
}

/// The grant of a cgroup that has adopted a socket; none if it is gone.
#[inline(always)]
pub fn of_adopter(record: &SocketRecord) -> Found {
    Found::NOTHING.or_nearer(record.adopted_by)
}

/// What the socket of a packet was granted, and what it asks for.
#[derive(Clone, Copy)]
pub struct Claim {
    pub granted: MaybeLevel,
    pub asked: MaybeLevel,
}

/// The socket of a packet; null for packets that are forwarded.
#[inline(always)]
pub fn socket_of(skb: *mut __sk_buff) -> *mut c_void {
    // SAFETY: the kernel hands the program a valid context for as long as it runs.
    unsafe { (*skb).__bindgen_anon_2.sk }.cast()
}

/// What the socket of a packet may claim. What is found is kept in the socket's record until grants change.
#[inline(always)]
pub fn claim_of(skb: *mut __sk_buff) -> Claim {
    let socket = socket_of(skb);
    if socket.is_null() {
        return Claim { granted: MaybeLevel::NONE, asked: MaybeLevel::NONE };
    }
    // First the generation: should grants change from here on, what is found now is looked for again.
    let generation = generation();
    let own = make_record(socket);
    let record = if own.is_some() {
        own
    } else {
        // A SYN-ACK: the request has no record, but its listener has.
        // SAFETY: the socket is not null, and from the context.
        make_record(unsafe { bpf_get_listener_sock(socket.cast()) })
    };
    match record {
        Some(record) if record.is_fresh(generation) => Claim { granted: record.granted(), asked: record.asked },
        Some(record) => {
            let adopter = if record.adopted_by == 0 { Found::NOTHING } else { of_adopter(record) };
            let found = if adopter.level == MaybeLevel::NONE { of_maker(skb) } else { adopter };
            record.send_buffer = found.send_buffer;
            record.remember(found.level, generation);
            Claim { granted: found.level, asked: record.asked }
        }
        None => Claim { granted: of_maker(skb).level, asked: MaybeLevel::NONE },
    }
}

/// Whether the socket of a packet was granted `level` or a higher one.
#[inline(always)]
pub fn covers(skb: *mut __sk_buff, level: Level) -> bool {
    MaybeLevel::from_number(qj_granted(skb)).covers(level)
}

/// The number of the level that the socket of a packet was granted; 8 without a grant.
///
/// A global function, which the verifier checks once, by itself (Linux 5.6). Inlined or static, the search for the
/// grant would make it follow 2.5 times as many instructions of the egress program: each path through the search
/// times each path through the rest.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qj_granted(skb: *mut __sk_buff) -> u32 {
    claim_of(skb).granted.level().map_or(u32::from(Level::STRICTEST.number()) + 1, |level| level.number().into())
}

/// The grant of the cgroup in which the socket of a packet was made; of a SYN-ACK, its listener.
#[inline(always)]
fn of_maker(skb: *mut __sk_buff) -> Found {
    // SAFETY: the context is valid.
    nearest(|depth| unsafe { bpf_skb_ancestor_cgroup_id(skb, depth) })
}
