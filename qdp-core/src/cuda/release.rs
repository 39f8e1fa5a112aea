//! How device memory goes: in stream order, behind everybody who used it.
//!
//! Dropping a buffer makes its home stream wait for each consumer stream, and frees it on the
//! home stream behind that. Neither can be said about a stream that is being captured: an event
//! recorded there belongs to the graph, and a free would become one of its nodes (both would
//! invalidate a capture that was none of our business). A buffer dropped meanwhile is parked, and
//! released at the first allocation, trim or drop that finds the captures over.

use std::sync::Arc;

use cudarc::driver::sys;
use parking_lot::Mutex;

use super::driver::{Live, shutting_down};
use super::{CaptureGuard, Context, Event, Pool, RawStream, Stream};
use crate::error::Result;

/// Process-wide and not the context's: an entry holds its context by `Arc`, and neither may keep
/// the other alive.
static PARKED: Mutex<Vec<Retired>> = Mutex::new(Vec::new());

/// The stream in whose order memory is allocated and freed.
#[derive(Debug, Clone)]
pub(super) enum Home {
    Owned(Arc<Stream>),
    Borrowed(RawStream),
}

impl Home {
    pub(super) fn raw(&self) -> RawStream {
        match self {
            Self::Owned(stream) => stream.raw(),
            Self::Borrowed(stream) => *stream,
        }
    }
}

/// Who frees the memory.
pub(super) enum Owner {
    /// We do, to the pool, on the home stream.
    Pool(Arc<Pool>),
    /// Whoever allocated it does, once this is dropped.
    External {
        #[allow(dead_code, reason = "kept for its destructor")]
        owner: Box<dyn Send + Sync>,
        /// Orders frees behind consumers, where there is one for many.
        join: Option<Arc<Mutex<Event>>>,
    },
}

/// Memory that nobody holds any more.
pub(super) struct Retired {
    pub(super) ptr: u64,
    pub(super) home: Home,
    pub(super) owner: Owner,
    /// Streams other than the home that used it, each once.
    pub(super) consumers: Vec<RawStream>,
    pub(super) context: Arc<Context>,
    #[allow(dead_code, reason = "counts the buffer as alive until it is released")]
    pub(super) live: Live,
}

/// Releases memory, now or, where a capture is in the way, later.
pub(super) fn retire(retired: Retired) {
    match retired.release() {
        // No capture was in the way, so none may be in the others' any more.
        None => release_parked(),
        Some(blocked) => PARKED.lock().push(blocked),
    }
}

/// Releases the parked memory that no capture is in the way of any more.
pub(super) fn release_parked() {
    // Taken out first: releasing runs owners' destructors, which may come back here.
    let parked = std::mem::take(&mut *PARKED.lock());
    if parked.is_empty() {
        return;
    }
    let blocked: Vec<_> = parked.into_iter().filter_map(Retired::release).collect();
    PARKED.lock().extend(blocked);
}

impl Retired {
    /// Enqueues the free, or hands `self` back where a capture is in the way.
    fn release(self) -> Option<Self> {
        let pool = match &self.owner {
            Owner::Pool(pool) if self.ptr != 0 => Some(pool),
            _ => None,
        };
        if shutting_down() || (pool.is_none() && self.consumers.is_empty()) {
            return None;
        }
        let context = Arc::clone(&self.context);
        let _bound = context.bind_in_drop()?;
        let home = self.home.raw();
        // A stream that cannot be asked is not being captured; what is wrong with it shows below.
        let captured = |stream: &RawStream| stream.is_capturing(&context).unwrap_or(false);
        if captured(&home) || self.consumers.iter().any(captured) {
            return Some(self);
        }
        for &consumer in &self.consumers {
            let ordered = match &self.owner {
                Owner::Pool(pool) => follow(home, consumer, &pool.join().lock()),
                Owner::External { join: Some(join), .. } => follow(home, consumer, &join.lock()),
                Owner::External { join: None, .. } => {
                    Event::new(&context).and_then(|event| follow(home, consumer, &event))
                }
            };
            // Where the device cannot be told to wait, the host waits: never free too early.
            if let Err(error) = ordered
                && consumer.synchronize(&context).is_err()
            {
                context.record_drop_failure(error);
            }
        }
        if pool.is_some() {
            let _capture = CaptureGuard::relaxed();
            // SAFETY: allocated from the pool, which `self` still holds, and freed only here; the
            // home stream waits for everybody who used it.
            context.check_drop("cuMemFreeAsync", || unsafe {
                sys::cuMemFreeAsync(self.ptr, home.raw())
            });
        }
        // `self` goes now, and with it an external owner: behind the guards above, as its
        // destructor is another library's code and expects the thread as its caller left it.
        None
    }
}

/// Makes later work on `stream` wait for the work that `other` holds now.
fn follow(stream: RawStream, other: RawStream, event: &Event) -> Result<()> {
    event.record(other)?;
    stream.wait(event)
}
