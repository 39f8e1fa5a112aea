//! What [`super::queue`] is built of. Its loom test puts loom's in the place of these.

pub(super) use parking_lot::{Condvar, Mutex};
pub(super) use std::hint::spin_loop;
pub(super) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// How often a thread that waits looks before it sleeps: for some tens of microseconds, as long as
/// a chunk takes on the link, and as waking takes at the least.
pub(super) const SPINS: usize = 2000;
