//! The gate that every driver call passes, so that a test build can make any one of them fail.
//! Elsewhere it is nothing but the call.

use cudarc::driver::sys::CUresult;

use super::Context;
#[cfg(feature = "fault-injection")]
use super::faults;

/// Makes a driver call, whose answer the caller examines. One that is to fail is not made.
#[inline]
pub(super) fn call(name: &'static str, ask: impl FnOnce() -> CUresult) -> CUresult {
    #[cfg(feature = "fault-injection")]
    if let Some(injected) = faults::next(name) {
        return injected;
    }
    let _ = name;
    ask()
}

/// [`call`] for calls that others rely on having been made: waits, after which memory is let go
/// (where a wait truly fails, the device has stopped), and what puts the caller's state back. One
/// that is to fail is made all the same.
#[inline]
pub(super) fn call_anyway(name: &'static str, ask: impl FnOnce() -> CUresult) -> CUresult {
    let answer = ask();
    call(name, || answer)
}

impl Context {
    /// Runs what a destructor must not leave undone. A call within that is to fail is made all the
    /// same, and the failure recorded: a fault that was only injected shall not make a leak.
    #[inline]
    #[cfg_attr(not(feature = "fault-injection"), allow(clippy::unused_self))]
    pub(super) fn undeterred<R>(&self, run: impl FnOnce() -> R) -> R {
        #[cfg(feature = "fault-injection")]
        {
            let (answer, injected) = faults::undeterred(run);
            if let Some((name, result)) = injected
                && let Err(error) = super::driver::verify(name, result)
            {
                self.record_drop_failure(error);
            }
            answer
        }
        #[cfg(not(feature = "fault-injection"))]
        run()
    }
}
