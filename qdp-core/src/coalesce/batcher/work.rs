//! What batches of samples are: rows of one plan, encoded by one call of the engine.

use super::config::BatcherConfig;
use super::inside::Inside;
use super::protocol::{Finished, Work};
use super::rows::Rows;
use super::{Listener, Listening, result};
use crate::encoding::Form;
use crate::engine::{Device, EncodeOptions, Engine};
use crate::error::{Error, Result};
use crate::input::{Input, OwnedInput};
use crate::pipeline::dispatch::catch;
use crate::plan::EncodePlan;
use crate::state::StateBatch;
use parking_lot::Mutex;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a batch at first, where nothing is known of how many requests come at once. Doubled
/// whenever a batch is full.
const FIRST_BYTES: usize = 256 << 10;

/// Bytes that a loop of tasks hands to a GPU by itself, in a tenth of a millisecond or two.
const SHORT_BYTES: u128 = 8 << 20;

/// Buffers that are kept for the next batches.
const MAX_SPARE: usize = 8;
/// Buffers of a size that may be in use at once: then one is waited for.
const ENOUGH: usize = 4;

/// Encodes batches.
pub(super) struct BatchWork {
    pub(super) engine: Engine,
    config: BatcherConfig,
    /// Bytes that a new batch is made for.
    bytes: AtomicUsize,
    spare: Mutex<Vec<Arc<Rows>>>,
}

/// Requests of one plan share their batches. Equal plans that are not the same would just not.
#[derive(Clone)]
pub(super) struct Key(pub(super) Arc<EncodePlan>);

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// What a batch gave.
#[derive(Clone)]
pub(super) struct Output {
    pub(super) states: Result<StateBatch>,
    /// Rows whose values the engine refused though they were checked.
    pub(super) refused: Arc<[(usize, Error)]>,
}

impl BatchWork {
    pub(super) fn new(engine: Engine, config: BatcherConfig) -> Self {
        // Who waits for others wants them all in one batch.
        let largest = !config.max_delay.is_zero();
        let bytes = if largest { config.max_batch_bytes } else { FIRST_BYTES };
        let bytes = AtomicUsize::new(bytes.min(config.max_batch_bytes));
        Self { engine, config, bytes, spare: Mutex::default() }
    }

    /// How many rows of a plan fit `bytes`.
    fn rows(&self, plan: &EncodePlan, bytes: usize) -> usize {
        let input = plan.features() * plan.dtype().size();
        let row = (input as u128).max(plan.output_bytes(1)).max(1);
        let rows = usize::try_from(bytes as u128 / row).unwrap_or(usize::MAX);
        rows.min(self.config.max_batch_samples)
    }

    /// The most rows of a batch of this plan.
    pub(super) fn max_rows(&self, plan: &EncodePlan) -> usize {
        self.rows(plan, self.config.max_batch_bytes)
    }

    /// Writes a request's own rows, see [`Rows::write`].
    pub(super) fn write_input(
        key: &Key,
        buffer: &Rows,
        rows: &Range<usize>,
        input: &Input<'_>,
    ) -> Result<()> {
        // SAFETY: the protocol gives a request its rows of a batch once, to nobody else, and reads
        // none before all of them are written; its callers come with rows that it gave them.
        unsafe { buffer.write(&key.0, rows, input) }
    }
}

impl Work for BatchWork {
    type Key = Key;
    type Buffer = Arc<Rows>;
    /// `None` where there is nothing to write.
    type Source = Option<OwnedInput>;
    type Listener = Listening;
    type Output = Output;
    type Error = Error;

    fn buffer(&self, Key(plan): &Key, rows: usize) -> Result<(Arc<Rows>, usize)> {
        let wanted = self.rows(plan, self.bytes.load(Ordering::Relaxed)).max(rows);
        let bytes = (wanted * plan.features() * plan.dtype().size()).next_power_of_two();
        let pinned = Rows::may_be_pinned(&self.engine, plan);
        let found = {
            let mut spare = self.spare.lock();
            let fit = |other: &Arc<Rows>| other.is_for(bytes, pinned);
            let mut index = spare.iter().position(|other| fit(other) && other.is_free());
            if index.is_none() && spare.iter().filter(|other| fit(other)).count() >= ENOUGH {
                index = spare.iter().position(fit); // the oldest will be free first
            }
            index.map(|index| spare.remove(index))
        };
        let buffer = match found {
            Some(buffer) => buffer,
            None => Arc::new(Rows::new(&self.engine, bytes, pinned)?),
        };
        buffer.reuse();
        Ok((buffer, wanted))
    }

    fn write(
        &self,
        key: &Key,
        buffer: &Arc<Rows>,
        rows: Range<usize>,
        source: Option<OwnedInput>,
    ) -> Result<()> {
        let Some(source) = source else { return Ok(()) };
        let _inside = Inside::enter(self);
        let written = catch(|| Self::write_input(key, buffer, &rows, &source.input()));
        // The owner may be anybody's, and so may what its destructor does.
        let dropped = catch(|| {
            drop(source);
            Ok(())
        });
        written.and(dropped)
    }

    fn run(&self, Key(plan): &Key, buffer: &Arc<Rows>, rows: usize, gather: bool) -> Output {
        let _inside = Inside::enter(self);
        let options = EncodeOptions {
            precision: Some(plan.precision()),
            leave_overdue: true,
            ..EncodeOptions::default()
        };
        // SAFETY: the protocol runs a batch once all of its rows are written, and it is recycled
        // before they are written again, which waits until they were read.
        let unwaited = catch(|| unsafe { buffer.encode(&self.engine, plan, rows) }.transpose());
        if let Ok(Some(states)) = unwaited {
            if gather {
                buffer.wait();
            }
            return Output { states: Ok(states), refused: [].into() };
        }
        let encode = || {
            catch(|| {
                // SAFETY: the protocol runs a batch once all of its rows are written, and nobody
                // writes them any more.
                let input = unsafe { buffer.input(plan, rows) };
                self.engine.encode_with(&input, plan.spec(), &options)
            })
        };
        let mut states = encode();
        let mut refused: Vec<(usize, Error)> = Vec::new();
        while let Err(error) = &states
            && let Some(row) = error.sample()
            && row < rows
            && refused.iter().all(|(other, _)| *other != row)
        {
            refused.push((row, error.clone()));
            // SAFETY: as above, and the call is over.
            unsafe { buffer.fill(plan, &(row..row + 1)) };
            states = encode();
        }
        Output { states, refused: refused.into() }
    }

    fn is_short(&self, Key(plan): &Key, rows: usize) -> bool {
        let bytes = (rows * plan.features() * plan.dtype().size()) as u128;
        let bytes = bytes.max(plan.output_bytes(rows));
        // A GPU is handed its work, and that is all; entangling takes a CPU a pass over the state
        // for each qubit.
        let passes = match (self.engine.device(), plan.form()) {
            (Device::Cuda(_), _) => 1,
            (Device::Cpu, Form::Diagonal(_)) => 32,
            (Device::Cpu, _) => 8,
        };
        bytes * passes <= SHORT_BYTES
    }

    fn recycle(&self, buffer: &Arc<Rows>, full: bool) {
        if full {
            let larger =
                |bytes: usize| Some(bytes.saturating_mul(2).min(self.config.max_batch_bytes));
            let _ = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, larger);
        }
        let mut spare = self.spare.lock();
        let oldest = (spare.len() == MAX_SPARE).then(|| spare.remove(0));
        spare.push(Arc::clone(buffer));
        drop(spare);
        drop(oldest); // not under the lock: letting go of page-locked memory takes a while
    }

    fn discard(&self, sources: Vec<Option<OwnedInput>>) {
        let _inside = Inside::enter(self);
        // The owners may be anybody's, and so may what their destructors do.
        for source in sources {
            let _ = catch_unwind(AssertUnwindSafe(|| drop(source)));
        }
    }

    fn deliver(&self, finished: Vec<Finished<Self>>) {
        let mut groups: Vec<(Arc<dyn Listener>, Vec<_>)> = Vec::new();
        for Finished { listener: Listening { listener, token }, outcome } in finished {
            let group = groups.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &listener));
            let result = (token, result(outcome, self.config.queue));
            match group {
                Some((_, results)) => results.push(result),
                None => groups.push((listener, vec![result])),
            }
        }
        let _inside = Inside::enter(self);
        for (listener, results) in groups {
            // Whatever it does is its own affair.
            let _ = catch_unwind(AssertUnwindSafe(|| listener.deliver(results)));
        }
    }
}
