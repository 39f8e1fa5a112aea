//! Fault injection, for tests: makes the k-th driver call of the process fail.
//!
//! A call that fails is not made, except where others rely on it: waits, destructors' calls and
//! those that put the thread's state back are made first. What only names an error
//! (`cuGetErrorName`, `cuGetErrorString`) is not counted.

use std::cell::Cell;

use cudarc::driver::sys::CUresult;
use parking_lot::Mutex;

/// What a call that is made to fail answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `CUDA_ERROR_UNKNOWN`.
    Unknown,
    /// `CUDA_ERROR_OUT_OF_MEMORY`.
    OutOfMemory,
}

impl Fault {
    /// The driver's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "CUDA_ERROR_UNKNOWN",
            Self::OutOfMemory => "CUDA_ERROR_OUT_OF_MEMORY",
        }
    }

    fn result(self) -> CUresult {
        match self {
            Self::Unknown => CUresult::CUDA_ERROR_UNKNOWN,
            Self::OutOfMemory => CUresult::CUDA_ERROR_OUT_OF_MEMORY,
        }
    }
}

/// Counts calls, and knows which one is to fail.
struct Injector {
    count: u64,
    armed: Option<(u64, Fault)>,
    failed: Option<&'static str>,
}

static INJECTOR: Mutex<Injector> = Mutex::new(Injector::new());

thread_local! {
    /// Within [`undeterred`], how deep.
    static UNDETERRED: Cell<u32> = const { Cell::new(0) };
    /// The failure that [`undeterred`] is to answer.
    static PENDING: Cell<Option<(&'static str, CUresult)>> = const { Cell::new(None) };
}

/// Makes the `k`-th driver call from now on fail, of any thread, with [`Fault::Unknown`]; the
/// first is 1.
pub fn fail_at(k: u64) {
    fail_at_with(k, Fault::Unknown);
}

/// [`fail_at`] with a fault of choice.
pub fn fail_at_with(k: u64, fault: Fault) {
    INJECTOR.lock().arm(k, fault);
}

/// No call is to fail any more. Answers the one that failed since [`fail_at`], if it came to that.
pub fn disarm() -> Option<&'static str> {
    INJECTOR.lock().disarm()
}

/// Driver calls of this process so far.
pub fn count() -> u64 {
    INJECTOR.lock().count
}

impl Injector {
    const fn new() -> Self {
        Self { count: 0, armed: None, failed: None }
    }

    fn arm(&mut self, k: u64, fault: Fault) {
        self.armed = Some((self.count + k, fault));
        self.failed = None;
    }

    fn disarm(&mut self) -> Option<&'static str> {
        self.armed = None;
        self.failed.take()
    }

    /// Counts one call; answers the fault where it is the one to fail.
    fn next(&mut self, name: &'static str) -> Option<Fault> {
        self.count += 1;
        let (_, fault) = self.armed.take_if(|(at, _)| *at == self.count)?;
        self.failed = Some(name);
        Some(fault)
    }
}

/// What the gate asks before a call: what it is to answer instead, if anything.
pub(super) fn next(name: &'static str) -> Option<CUresult> {
    let injected = INJECTOR.lock().next(name)?.result();
    if UNDETERRED.get() == 0 {
        return Some(injected);
    }
    PENDING.set(Some((name, injected)));
    None
}

/// Runs something in which every call is made. Answers also the failure that was to be.
pub(super) fn undeterred<R>(run: impl FnOnce() -> R) -> (R, Option<(&'static str, CUresult)>) {
    UNDETERRED.set(UNDETERRED.get() + 1);
    let answer = run();
    UNDETERRED.set(UNDETERRED.get() - 1);
    (answer, PENDING.take())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kth_call_fails_and_only_that() {
        let mut injector = Injector::new();
        assert_eq!(injector.next("a"), None);
        injector.arm(2, Fault::OutOfMemory);
        assert_eq!(injector.next("b"), None);
        assert_eq!(injector.next("c"), Some(Fault::OutOfMemory));
        assert_eq!(injector.next("d"), None);
        assert_eq!((injector.count, injector.disarm(), injector.disarm()), (4, Some("c"), None));
        injector.arm(1, Fault::Unknown);
        assert_eq!(injector.disarm(), None);
        assert_eq!(injector.next("e"), None);
    }

    #[test]
    fn undeterred_code_answers_what_was_to_fail() {
        let pending = || PENDING.set(Some(("inner", CUresult::CUDA_ERROR_UNKNOWN)));
        let ((), injected) = undeterred(|| {
            assert_eq!(UNDETERRED.get(), 1);
            pending();
        });
        assert_eq!(injected, Some(("inner", CUresult::CUDA_ERROR_UNKNOWN)));
        assert_eq!((UNDETERRED.get(), undeterred(|| 5)), (0, (5, None)));
    }
}
