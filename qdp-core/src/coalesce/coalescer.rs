//! Requests, one after another, and the batches that they become.

use super::gather::{Gathered, promote};
use super::stats::{CoalesceStats, FlushReason};
use crate::element::{DType, Precision};
use crate::encoding::{EncodeSpec, Encoding};
use crate::engine::{EncodeOptions, Engine};
use crate::error::{Error, Result};
use crate::input::Input;
use crate::pipeline::stage;
use crate::state::StateBatch;
use std::ops::Range;
use std::time::Instant;

/// How requests are coalesced.
#[derive(Debug, Clone, Copy)]
pub struct CoalesceOptions {
    /// How each batch is encoded. Without a precision, a batch has that of its widest request.
    pub encode: EncodeOptions,
    /// Samples that may wait; with so many they are encoded.
    pub max_samples: usize,
    /// Bytes of samples that may wait; with so many they are encoded. A request of more by itself
    /// does not wait.
    pub max_bytes: usize,
}

impl Default for CoalesceOptions {
    fn default() -> Self {
        Self { encode: EncodeOptions::default(), max_samples: usize::MAX, max_bytes: 256 << 20 }
    }
}

impl CoalesceOptions {
    fn validate(&self) -> Result<()> {
        for (argument, value) in [("max_samples", self.max_samples), ("max_bytes", self.max_bytes)]
        {
            if value == 0 {
                return Err(Error::invalid(argument, "a positive integer", value));
            }
        }
        Ok(())
    }
}

/// A request that waits.
struct Queued<K> {
    waiting: Waiting,
    /// What keeps its memory.
    keep: K,
}

/// A request's number, and its samples.
#[derive(Clone, Copy)]
struct Waiting {
    request: usize,
    input: Input<'static>,
}

/// What became of a request.
#[derive(Debug, Clone)]
enum Outcome {
    Queued,
    /// Rows of a batch.
    Encoded {
        part: usize,
        rows: Range<usize>,
    },
    // In a box, as there are many outcomes and few errors.
    Failed(Box<Error>),
}

/// Queues references to samples and encodes them together, in the order in which they came.
///
/// Whatever is wrong with the values, the shape or the type of one request is that request's own
/// error; the others are encoded as if it had not been there. Any other error, of the device say,
/// is that of all requests that were to be encoded together.
///
/// `K` keeps the memory of one request; it is handed back when that has been read.
pub struct Coalescer<K> {
    engine: Engine,
    spec: EncodeSpec,
    options: CoalesceOptions,
    queue: Vec<Queued<K>>,
    queued_samples: usize,
    queued_bytes: usize,
    /// When the first of the queue came.
    since: Option<Instant>,
    outcomes: Vec<Outcome>,
    /// The number of each request's first sample.
    firsts: Vec<usize>,
    parts: Vec<StateBatch>,
    /// What kept requests that are not queued any more.
    spent: Vec<K>,
    /// A kind of request that was looked at and is fine.
    accepted: Option<(DType, usize)>,
    stats: CoalesceStats,
}

impl<K> Coalescer<K> {
    /// A coalescer of samples that are all encoded alike.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for thresholds of zero; what deferred validation has found in
    /// earlier encodes of the engine, which no request raises.
    pub fn new(engine: Engine, spec: EncodeSpec, options: CoalesceOptions) -> Result<Self> {
        options.validate()?;
        engine.raise_overdue()?; // now, as later it would be some request's
        let encode = EncodeOptions { leave_overdue: true, ..options.encode };
        let options = CoalesceOptions { encode, ..options };
        Ok(Self {
            engine,
            spec,
            options,
            queue: Vec::new(),
            queued_samples: 0,
            queued_bytes: 0,
            since: None,
            outcomes: Vec::new(),
            firsts: Vec::new(),
            parts: Vec::new(),
            spent: Vec::new(),
            accepted: None,
            stats: CoalesceStats::default(),
        })
    }

    /// How requests are coalesced.
    pub fn options(&self) -> &CoalesceOptions {
        &self.options
    }

    /// Requests so far. The next one will have this number.
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// Whether there was no request so far.
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// Requests that wait.
    pub fn num_queued(&self) -> usize {
        self.queue.len()
    }

    /// What was done so far.
    pub fn stats(&self) -> &CoalesceStats {
        &self.stats
    }

    /// Whether a request is not queued but goes through [`Self::pass_through`]: one on a device, a
    /// large one, or one whose features are mapped.
    pub fn passes_through(&self, input: &Input<'_>) -> bool {
        let alone = input.device() != crate::Device::Cpu || input.affine().is_some();
        alone || input.num_bytes() > self.options.max_bytes
    }

    /// Queues a request on the host. Where that makes too much wait, the answer is the reason for
    /// [`Self::flush_for`]. What is wrong with the request itself is noted and is the error of its
    /// [`Self::result`].
    ///
    /// # Safety
    ///
    /// The memory of `input` must be as [`Input::from_raw`] asks for until `keep` is dropped.
    pub unsafe fn submit(&mut self, input: &Input<'_>, keep: K) -> Option<FlushReason> {
        let samples = input.batch();
        self.count(samples);
        if let Err(error) = self.accept(input) {
            self.spent.push(keep);
            self.note_failure(error);
            return None;
        }
        self.since.get_or_insert_with(Instant::now);
        // SAFETY: the caller's promise, as `keep` goes along.
        let input = unsafe { input.for_any_lifetime() };
        self.queued_samples += samples;
        self.queued_bytes += input.num_bytes();
        let waiting = Waiting { request: self.outcomes.len(), input };
        self.queue.push(Queued { waiting, keep });
        self.outcomes.push(Outcome::Queued);
        if self.queued_samples >= self.options.max_samples {
            return Some(FlushReason::Samples);
        }
        (self.queued_bytes >= self.options.max_bytes).then_some(FlushReason::Bytes)
    }

    /// Encodes a request at once and by itself, behind those that wait. The answer is theirs: an
    /// error of the request itself is that of its [`Self::result`].
    pub fn pass_through(&mut self, input: &Input<'_>, options: &EncodeOptions) -> Result<()> {
        let flushed = self.flush_for(FlushReason::Order);
        self.count(input.batch());
        self.stats.passed_through += 1;
        match self.engine.encode_with(input, &self.spec, options) {
            Ok(states) => {
                let rows = 0..states.batch();
                self.outcomes.push(Outcome::Encoded { part: self.parts.len(), rows });
                self.parts.push(states);
            }
            Err(error) => self.note_failure(error),
        }
        flushed
    }

    /// Notes a request, of one sample, that cannot even be described.
    pub fn fail(&mut self, error: Error) {
        self.count(1);
        self.note_failure(error);
    }

    fn count(&mut self, samples: usize) {
        self.firsts.push(self.stats.samples as usize);
        self.stats.requests += 1;
        self.stats.samples += samples as u64;
    }

    fn note_failure(&mut self, error: Error) {
        self.stats.failed += 1;
        self.outcomes.push(Outcome::Failed(Box::new(error)));
    }

    /// Encodes what waits.
    ///
    /// # Errors
    ///
    /// Those that no request is to blame for; all requests that waited have it, too.
    pub fn flush(&mut self) -> Result<()> {
        self.flush_for(FlushReason::Demand)
    }

    /// Lets go of what waits; those requests fail with [`Error::Cancelled`].
    pub fn cancel(&mut self) {
        self.stats.cancelled += self.queue.len() as u64;
        for queued in &self.queue {
            self.outcomes[queued.waiting.request] = Outcome::Failed(Box::new(Error::Cancelled));
        }
        self.dequeue();
    }

    /// What kept requests that have been read or cancelled since this was last asked.
    pub fn take_spent(&mut self) -> Vec<K> {
        std::mem::take(&mut self.spent)
    }

    /// The states of a request, by its number: a view of the batch that it was encoded in. Flushes
    /// where it waits.
    ///
    /// # Errors
    ///
    /// The request's own; that of its batch; [`Error::Cancelled`];
    /// [`Error::InvalidArgument`] where there is no such request.
    pub fn result(&mut self, request: usize) -> Result<StateBatch> {
        if let Some(Outcome::Queued) = self.outcomes.get(request) {
            // Anything else that it says is said of this request.
            if self.flush() == Err(Error::Interrupted) {
                return Err(Error::Interrupted);
            }
        }
        match self.outcomes.get(request) {
            Some(Outcome::Encoded { part, rows }) => self.parts[*part].slice(rows.clone()),
            Some(Outcome::Failed(error)) => Err((**error).clone()),
            Some(Outcome::Queued) => Err(Error::Cancelled),
            None => {
                let expected = format!("less than {}", self.outcomes.len());
                Err(Error::invalid("request", expected, request))
            }
        }
    }

    /// Whether a request is not waiting any more.
    pub fn is_done(&self, request: usize) -> bool {
        !matches!(self.outcomes.get(request), Some(Outcome::Queued))
    }

    /// What keeps the requests that wait.
    pub fn kept(&self) -> impl Iterator<Item = &K> {
        self.queue.iter().map(|queued| &queued.keep)
    }

    /// Whether a request was cancelled.
    pub fn is_cancelled(&self, request: usize) -> bool {
        let outcome = self.outcomes.get(request);
        matches!(outcome, Some(Outcome::Failed(error)) if **error == Error::Cancelled)
    }

    /// The first request that has an error, which is about its sample in the whole.
    pub fn first_failure(&self) -> Option<(usize, Error)> {
        let mut outcomes = self.outcomes.iter().zip(&self.firsts).enumerate();
        outcomes.find_map(|(request, (outcome, first))| {
            let Outcome::Failed(error) = outcome else { return None };
            let sample = first + error.sample().unwrap_or_default();
            Some((request, (**error).clone().about_sample(sample)))
        })
    }

    /// All states, in the order of the requests. Flushes first. Several batches are copied into
    /// one.
    ///
    /// # Errors
    ///
    /// That of the first request that has one, about its sample in the whole;
    /// [`Error::InvalidArgument`] where batches have several precisions.
    pub fn states(&mut self) -> Result<StateBatch> {
        self.flush()?;
        if let Some((_, error)) = self.first_failure() {
            return Err(error);
        }
        match self.parts.as_slice() {
            [] => {
                let empty: [f32; 0] = [];
                let features = self.spec.num_features();
                // SAFETY: no value is read.
                let input = unsafe {
                    let (ptr, device) = (empty.as_ptr().cast(), crate::Device::Cpu);
                    Input::from_raw(ptr, DType::F32, device, (0, features), (0, 1))
                };
                self.engine.encode(&input, &self.spec, self.options.encode.precision)
            }
            [whole] => Ok(whole.clone()),
            parts => {
                let whole = StateBatch::concatenate(parts)?;
                let mut first = 0;
                for outcome in &mut self.outcomes {
                    if let Outcome::Encoded { part, rows } = outcome {
                        (*part, *rows) = (0, first..first + rows.len());
                        first = rows.end;
                    }
                }
                self.parts = vec![whole.clone()];
                Ok(whole)
            }
        }
    }

    /// Refuses a request that cannot be encoded whatever its values are.
    fn accept(&mut self, input: &Input<'_>) -> Result<()> {
        input.refuse_affine("samples that are collected")?;
        let kind = (input.dtype(), input.features());
        if self.accepted != Some(kind) {
            self.engine.plan(input, &self.spec, self.options.encode.precision)?;
            self.accepted = Some(kind);
        }
        Ok(())
    }

    fn dequeue(&mut self) {
        self.spent.extend(self.queue.drain(..).map(|queued| queued.keep));
        (self.queued_samples, self.queued_bytes, self.since) = (0, 0, None);
    }

    /// [`Self::flush`], and why.
    ///
    /// # Errors
    ///
    /// Those of [`Self::flush`].
    pub fn flush_for(&mut self, reason: FlushReason) -> Result<()> {
        if self.queue.is_empty() {
            return Ok(());
        }
        let waited = self.since.map(|since| since.elapsed()).unwrap_or_default();
        self.stats.flushed(reason, self.queued_samples, waited);
        let waiting: Vec<Waiting> = self.queue.iter().map(|queued| queued.waiting).collect();
        let (mut result, spec) = (Ok(()), self.spec.clone());
        for run in waiting.chunk_by(|a, b| go_together(&spec, &a.input, &b.input)) {
            if result == Err(Error::Interrupted) {
                for waiting in run {
                    self.outcomes[waiting.request] = Outcome::Failed(Box::new(Error::Cancelled));
                }
            } else {
                result = result.and(self.encode_run(run));
            }
        }
        self.dequeue();
        result
    }

    /// Encodes consecutive requests as one batch, less those that have something wrong with them.
    fn encode_run(&mut self, run: &[Waiting]) -> Result<()> {
        let mut good = run.to_vec();
        while let Some(first) = good.first() {
            let dtypes = || good.iter().map(|waiting| waiting.input.dtype());
            let dtype = dtypes().fold(first.input.dtype(), promote);
            let wide = dtypes().any(|dtype| dtype.natural_precision() == Precision::Complex128);
            let natural = if wide { Precision::Complex128 } else { Precision::Complex64 };
            let precision = Some(self.options.encode.precision.unwrap_or(natural));
            let mut gathered = Gathered::default();
            for waiting in &good {
                // SAFETY: the queue keeps the memory, and is not changed before this is dropped.
                unsafe { gathered.push(&waiting.input, dtype) };
            }
            let input = gathered.input(dtype);
            let options = EncodeOptions { precision, ..self.options.encode };
            let error = match self.engine.encode_with(&input, &self.spec, &options) {
                Ok(states) => {
                    let (part, mut end) = (self.parts.len(), 0);
                    self.parts.push(states);
                    for waiting in &good {
                        let rows = end..end + waiting.input.batch();
                        end = rows.end;
                        self.outcomes[waiting.request] = Outcome::Encoded { part, rows };
                    }
                    return Ok(());
                }
                Err(error) => error,
            };
            let before = good.len();
            if error.sample().is_some() {
                let plan = self.engine.plan(&input, &self.spec, precision)?;
                self.fail_bad(&mut good, stage::faults(&plan, &input));
            }
            if good.len() == before {
                // Not about any request.
                self.stats.failed += good.len() as u64;
                let shared =
                    if error == Error::Interrupted { Error::Cancelled } else { error.clone() };
                for waiting in &good {
                    self.outcomes[waiting.request] = Outcome::Failed(Box::new(shared.clone()));
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes requests out of `good` that have something wrong with a sample, of all their samples.
    fn fail_bad(&mut self, good: &mut Vec<Waiting>, faults: Vec<(usize, Error)>) {
        let mut faults = faults.into_iter().peekable();
        let mut end = 0;
        good.retain(|waiting| {
            let start = end;
            end += waiting.input.batch();
            let mut first = None;
            while let Some((sample, fault)) = faults.next_if(|&(sample, _)| sample < end) {
                first.get_or_insert_with(|| fault.about_sample(sample - start));
            }
            let Some(fault) = first else { return true };
            self.stats.failed += 1;
            self.outcomes[waiting.request] = Outcome::Failed(Box::new(fault));
            false
        });
    }
}

/// Whether one plan can encode both. Amplitudes of any length go together, as the shorter ones are
/// padded; an index and bits do not.
fn go_together(spec: &EncodeSpec, a: &Input<'_>, b: &Input<'_>) -> bool {
    *spec.encoding() == Encoding::Amplitude || a.features() == b.features()
}

impl<K> std::fmt::Debug for Coalescer<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coalescer")
            .field("requests", &self.len())
            .field("queued", &self.num_queued())
            .finish_non_exhaustive()
    }
}
