//! What a call will need and do, without running it.
#![forbid(unsafe_code)]

use crate::plan::EncodePlan;

/// What encoding a batch needs and does. Of states that do not fit there is no plan: its slots,
/// rounds, chunks and workspace are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of the input.
    pub input_bytes: u64,
    /// Bytes of the states.
    pub output_bytes: u64,
    /// Bytes that travel to the device: fewer than the input has where the result has no use for
    /// all of them.
    pub copied_bytes: u64,
    /// Bytes of device memory beside the states while the call runs, less what the engine holds
    /// anyway.
    pub workspace_bytes: u64,
    /// Bytes of each of the ring's slots, in page-locked and in device memory.
    pub slot_bytes: u64,
    /// Slots that the call uses at a time.
    pub slots: u64,
    /// Rounds, after each of which other calls have their turn.
    pub rounds: u64,
    /// Chunks of all rounds.
    pub chunks: u64,
    /// Whether the input takes the direct path.
    pub direct: bool,
    /// Bytes free for the states now.
    pub free_bytes: u64,
    /// Whether the states fit.
    pub fits: bool,
}

impl Estimate {
    /// What the sizes alone say: one round, where there is something to do and the states fit.
    pub(crate) fn of_sizes(plan: &EncodePlan, batch: usize, free_bytes: u64) -> Self {
        let bytes = |count: u128| u64::try_from(count).unwrap_or(u64::MAX);
        let values = batch as u128 * plan.features() as u128;
        let output = plan.output_bytes(batch);
        let fits = output <= u128::from(free_bytes);
        Self {
            input_bytes: bytes(values * plan.dtype().size() as u128),
            output_bytes: bytes(output),
            copied_bytes: 0,
            workspace_bytes: 0,
            slot_bytes: 0,
            slots: 0,
            rounds: u64::from(batch > 0 && fits),
            chunks: 0,
            direct: false,
            free_bytes,
            fits,
        }
    }
}
