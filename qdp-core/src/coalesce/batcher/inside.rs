//! Whether a thread is inside a batcher's work already.
//!
//! What a leader runs may be anybody's code, a listener or a signal's handler, and may call the
//! batcher. To wait for the leader it would then wait for itself.
#![forbid(unsafe_code)]

use std::cell::RefCell;

thread_local! {
    /// The batchers whose work this thread is in, by address.
    static INSIDE: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// The thread is inside until this is dropped.
pub(super) struct Inside(());

impl Inside {
    pub(super) fn enter<T>(work: &T) -> Self {
        INSIDE.with_borrow_mut(|inside| inside.push(std::ptr::from_ref(work).addr()));
        Self(())
    }

    pub(super) fn is<T>(work: &T) -> bool {
        INSIDE.with_borrow(|inside| inside.contains(&std::ptr::from_ref(work).addr()))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with_borrow_mut(Vec::pop);
    }
}
