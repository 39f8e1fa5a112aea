//! Many small requests at the speed of one large one.
//!
//! A [`Coalescer`] queues references to samples, in the host's memory or on the device, and encodes
//! all of them at once: nothing is copied before, and then everything once, straight to where the
//! device reads it. [`Engine::run_coalesced`](crate::Engine::run_coalesced) is a scope around one,
//! whose samples the compiler keeps alive.
//!
//! A [`Batcher`](batcher::Batcher) does so for servers: any number of threads and tasks ask for one
//! sample each, and those that come while a batch is in flight are the next one.

pub mod batcher;
mod coalescer;
mod gather;
mod scope;
mod stats;
#[cfg(test)]
mod tests;

pub use coalescer::{CoalesceOptions, Coalescer};
pub use scope::{Coalesced, Handle, Scope};
pub use stats::{BUCKETS, CoalesceStats, FlushReason};
