//! Leads the chunks of a round through the ring.
#![forbid(unsafe_code)]

use super::plan::{Chunk, Cut};
use super::queue::{CloseOnPanic, Queue};
use super::ring::{Lane, Ring, Run};
use super::stats::Counters;
use crate::cpu::parallel::STAGE;
use crate::error::{Error, Result};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// One thread more is called for each so many bytes.
const BYTES_PER_THREAD: usize = 64 << 10;

/// What staging found in the pieces: their sums of squares, and the first error.
struct Findings {
    sums: Vec<AtomicU64>,
    error: Mutex<Option<(usize, Error)>>,
}

/// Stages, copies and encodes the chunks of `cut` from the chunk `from` on, in order, until `pause`,
/// which is asked between chunks, says to leave the ring to others. Returns the next chunk and the
/// sums of squares of the pieces up to there.
///
/// When this returns, the input has been read as far as it is staged; copies and kernels may be in
/// flight. On an error some chunks may be, too.
pub(crate) fn drive<L: Lane>(
    ring: &mut Ring,
    lane: &L,
    cut: &Cut,
    from: usize,
    threads: usize,
    counters: &Counters,
    pause: &mut dyn FnMut() -> bool,
) -> Result<(usize, Vec<f64>)> {
    // The queue counts chunks and pieces from here.
    let chunks = &cut.chunks[from..];
    let first_piece = chunks.first().map_or(0, |chunk| chunk.pieces.start);
    let pieces = &cut.pieces[first_piece..];
    let queue = Queue::new(chunks.iter().map(|chunk| chunk.pieces.len()));
    let findings = Findings {
        sums: pieces.iter().map(|_| AtomicU64::new(0)).collect(),
        error: Mutex::new(None),
    };
    let (first, slots) = (ring.next_slot(), ring.len());
    let mut run = ring.run(lane)?;
    let stage = |index: usize| {
        let piece = &pieces[index];
        let chunk = piece.chunk - from;
        match lane.stage((first + chunk) % slots, piece) {
            Ok(sum) => findings.sums[index].store(sum.to_bits(), Ordering::Relaxed),
            Err(error) => {
                // Pieces before this one have all been handed out and will be staged, so the
                // first error is found whichever thread meets one first.
                let mut first = findings.error.lock();
                if first.as_ref().is_none_or(|&(other, _)| index < other) {
                    *first = Some((index, error));
                }
                queue.close();
            }
        }
        queue.done(chunk);
    };
    let help = || {
        let _guard = CloseOnPanic(&queue);
        while let Some(piece) = queue.take() {
            stage(piece);
        }
    };
    let lead = || {
        let _guard = CloseOnPanic(&queue);
        let led = lead(&mut run, chunks, &queue, &stage, counters, pause);
        queue.close();
        led
    };
    let bytes: usize = chunks.iter().map(|chunk| chunk.bytes).sum();
    let helpers = (bytes / BYTES_PER_THREAD).min(pieces.len() / 2);
    let helpers = helpers.min(threads.saturating_sub(1));
    let led = STAGE.lead(helpers, help, lead);
    drop(run);
    if led.is_err() {
        // With the lane that failed, as another does not know its streams. Where even waiting
        // fails, the next run tries again.
        let _ = ring.settle(lane);
    }
    // What the data says comes first.
    if let Some((_, error)) = findings.error.into_inner() {
        return Err(error);
    }
    let sent = led?;
    let staged = chunks[..sent].iter().map(|chunk| chunk.pieces.len()).sum();
    let sums = findings.sums.into_iter().take(staged);
    Ok((from + sent, sums.map(|sum| f64::from_bits(sum.into_inner())).collect()))
}

/// Enqueues each chunk when it is staged, gives slots to chunks as they come free, and stages along
/// where there is nothing else to do. Returns how many chunks were sent: all but those that had no
/// slot yet at a pause.
fn lead<L: Lane>(
    run: &mut Run<'_, L>,
    mut chunks: &[Chunk],
    queue: &Queue,
    stage: &dyn Fn(usize),
    counters: &Counters,
    pause: &mut dyn FnMut() -> bool,
) -> Result<usize> {
    let first_piece = chunks.first().map_or(0, |chunk| chunk.pieces.start);
    let mut sent = 0;
    let mut tokens = VecDeque::new();
    while sent < chunks.len() {
        if queue.is_closed() {
            return Ok(sent); // a piece is bad: what is left need not be copied
        }
        let open = sent + tokens.len();
        if sent < open && queue.is_staged(sent) {
            // `tokens` has one for each chunk that is open.
            let Some(token) = tokens.pop_front() else { break };
            let token = run.copy(token, &chunks[sent])?;
            let token = run.compute(token, &chunks[sent])?;
            run.send_off(token);
            sent += 1;
            continue;
        }
        if open < chunks.len() {
            // A slot is waited for only where there is nothing else to do.
            let mut token = run.take(false)?;
            if token.is_none() && sent == open {
                let began = Instant::now();
                token = run.take(true)?;
                counters.waited(began.elapsed());
            }
            if let Some(token) = token {
                tokens.push_back(token);
                counters.occupied(run.occupied());
                queue.open(chunks[open].pieces.end - first_piece);
                if pause() {
                    chunks = &chunks[..=open];
                }
                continue;
            }
        }
        if let Some(piece) = queue.try_take() {
            stage(piece);
        } else if !queue.wait_staged(sent) {
            return Ok(sent);
        }
    }
    Ok(sent)
}
