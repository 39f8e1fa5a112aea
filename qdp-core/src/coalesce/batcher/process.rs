//! Which process this is, asked at every request: without a system call.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// How often this process's ancestors were forked since the first batcher.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// The process that something belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process(u32);

impl Process {
    pub(super) fn current() -> Self {
        Self(if is_counted() { FORKS.load(Ordering::Relaxed) } else { std::process::id() })
    }

    pub(super) fn is_current(self) -> bool {
        self == Self::current()
    }
}

/// Whether forks are counted: the system may have no room for another handler.
fn is_counted() -> bool {
    static COUNTED: OnceLock<bool> = OnceLock::new();
    *COUNTED.get_or_init(|| {
        #[cfg(unix)]
        // SAFETY: the handler does what is allowed between a fork and what follows: one atomic
        // addition. It stays where it is, as a Python extension or a program is not unloaded.
        unsafe {
            libc::pthread_atfork(None, None, Some(count)) == 0
        }
        #[cfg(not(unix))]
        false
    })
}

#[cfg(unix)]
extern "C" fn count() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}
