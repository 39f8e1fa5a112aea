//! Host input on its way to a device: one path for every size.
//!
//! [`plan`] cuts a call into rounds, chunks and pieces. A chunk passes through one slot of the
//! [`ring`]: it is staged into the slot's page-locked memory, piece by piece, by the threads that
//! [`queue`] hands the pieces to ([`stage`] says what staging a piece is), copied to the slot's
//! device memory, and encoded from there. [`drive`] leads: it is the calling thread, which gives
//! every slot its next task and stages pieces itself while there is nothing else to do.
//!
//! Who owns what. The engine owns the ring and its slots; a call borrows them, one at a time, and
//! leaves slots in flight behind when it returns. Whoever holds a slot's token may touch the slot,
//! nobody else; tokens move. What may be in flight: copies from page-locked memory that is not
//! written again before its copy is known to be done, and kernels that read device memory which
//! the next copy to it waits for on the device.
//!
//! The driver is behind the trait [`ring::Lane`]: the CUDA backend implements it, and so do the
//! tests, which run the whole pipeline without a GPU and fail it at every step.

mod cache;
pub mod config;
pub mod dispatch;
pub(crate) mod drive;
pub mod estimate;
pub(crate) mod plan;
pub(crate) mod queue;
pub(crate) mod ring;
pub(crate) mod stage;
pub mod stats;
mod sync;

#[cfg(test)]
mod tests;
