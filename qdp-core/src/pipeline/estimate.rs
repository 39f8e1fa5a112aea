//! What a call will need and do, without running it.
#![forbid(unsafe_code)]

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
