//! A batcher: requests of any number of threads and tasks, encoded together.
//!
//! [`protocol`] says who does what when; [`rows`] is the memory that requests are collected in,
//! [`work`] what is done with a batch of them.
//!
//! ```
//! use qdp_core::coalesce::batcher::RequestOptions;
//! use qdp_core::{Batcher, BatcherConfig, Device, EncodeSpec, Encoding, Engine, Input};
//!
//! let engine = Engine::open(Device::Cpu)?;
//! let batcher = Batcher::new(&engine, BatcherConfig::default())?;
//! let spec = EncodeSpec::new(Encoding::Amplitude, 1)?;
//! std::thread::scope(|scope| {
//!     for i in 0..4 {
//!         let (batcher, spec) = (&batcher, &spec);
//!         scope.spawn(move || {
//!             let sample = [f64::from(i), 1.0];
//!             let state = batcher.encode(&Input::sample(&sample), spec, &RequestOptions::default());
//!             assert_eq!(state.unwrap().batch(), 1);
//!         });
//!     }
//! });
//! # Ok::<(), qdp_core::Error>(())
//! ```

mod config;
mod inside;
mod process;
mod protocol;
mod rows;
mod sync;
mod work;

#[cfg(test)]
mod tests;

pub use config::{BatcherConfig, WhenFull};
pub use protocol::stats::{BatcherStats, SIZE_CLASSES};
pub(crate) use rows::fill;

use crate::element::Precision;
use crate::encoding::EncodeSpec;
use crate::engine::{Device, EncodeOptions, Engine};
use crate::error::{Error, Result};
use crate::input::{Input, OwnedInput};
use crate::pipeline::dispatch::Dispatched;
use crate::state::StateBatch;
use inside::Inside;
use parking_lot::Mutex;
use process::Process;
use protocol::{Called, Failure, Limits, Outcome, Protocol, Ticket};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use work::{BatchWork, Key, Output};

/// How a request is encoded.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestOptions {
    /// Precision of the result; `None` follows the input.
    pub precision: Option<Precision>,
    /// When the request is no longer wanted: it fails with [`Error::DeadlineExceeded`] where its
    /// batch has not started by then.
    pub deadline: Option<Instant>,
    /// Batches of higher priority start first.
    pub priority: i32,
    /// As [`EncodeOptions::interrupt`], for a request whose caller waits for it: on its thread, while
    /// it waits for others or is encoded alone.
    pub interrupt: Option<fn() -> Result<()>>,
}

/// Learns of the ends of asynchronous requests.
pub trait Listener: Send + Sync {
    /// Requests that this listener was named for are done, all those of a batch: by the tokens that
    /// they were made with, their results.
    ///
    /// It is called on whichever thread led the batch, so it should be short.
    fn deliver(&self, results: Vec<(u64, Result<StateBatch>)>);

    /// Whether the thread that submits requests calls [`Batcher::lead`] when it has no more of them,
    /// where a request says so ([`Request::is_to_be_led`]). A thread that serves many tasks spares
    /// them the way over another one so.
    fn leads(&self) -> bool {
        false
    }
}

/// A listener, and what it knows a request by.
pub(crate) struct Listening {
    listener: Arc<dyn Listener>,
    token: u64,
}

/// Encodes the requests of any number of threads and tasks together.
///
/// Requests that come while a batch is in flight form the next one, each of the same encoding,
/// element type, length, precision and priority. Where nothing is in flight a call is encoded at
/// once, on its own thread, or with [`BatcherConfig::max_delay`], once its oldest request has waited
/// so long. A request's values are checked before anybody else's states depend on them. The states
/// of a batch share their memory.
///
/// Dropping it is closing it.
pub struct Batcher {
    protocol: Arc<Protocol<BatchWork>>,
    config: BatcherConfig,
    /// Started with the first asynchronous request.
    worker: Mutex<Option<JoinHandle<()>>>,
    process: Process,
}

impl fmt::Debug for Batcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batcher").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Batcher {
    /// A batcher for an engine.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for settings that mean nothing.
    pub fn new(engine: &Engine, config: BatcherConfig) -> Result<Self> {
        config.validate()?;
        let limits = Limits {
            delay: config.max_delay,
            queue: config.queue,
            refuse: config.when_full == WhenFull::Refuse,
        };
        // The other half is for who leads and who prepares requests, in Python also for those who
        // look for its lock.
        let looking = (Engine::num_threads() / 2).saturating_sub(1);
        let work = BatchWork::new(engine.clone(), config.clone());
        Ok(Self {
            protocol: Arc::new(Protocol::new(work, limits, looking)),
            config,
            worker: Mutex::new(None),
            process: Process::current(),
        })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.protocol.work.engine
    }

    /// The settings.
    pub fn config(&self) -> &BatcherConfig {
        &self.config
    }

    /// What it has done.
    pub fn stats(&self) -> BatcherStats {
        if self.is_forked() { BatcherStats::default() } else { self.protocol.stats() }
    }

    /// Requests that wait now.
    pub fn waiting(&self) -> usize {
        if self.is_forked() { 0 } else { self.protocol.waiting() }
    }

    /// Whether it takes no more requests.
    pub fn is_closed(&self) -> bool {
        self.is_forked() || self.protocol.is_closed()
    }

    /// Counts a request that whoever has the batcher encodes in another way.
    ///
    /// # Errors
    ///
    /// [`Error::BatcherClosed`].
    pub fn count_direct(&self) -> Result<()> {
        self.check_process()?;
        self.protocol.count_direct().map_err(|failure| self.error(failure))
    }

    /// Encodes a sample or several, together with what others ask for meanwhile.
    ///
    /// A request larger than a batch, or on a device, goes straight to the engine, and device input
    /// is validated before this returns. So does one that is made in the middle of this batcher's own
    /// work, by a listener or a signal's handler. They do not count as waiting.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::encode_with`] about this request; [`Error::QueueFull`],
    /// [`Error::DeadlineExceeded`], [`Error::BatcherClosed`]. A failure of the device reaches every
    /// request of the batch.
    pub fn encode(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        options: &RequestOptions,
    ) -> Result<StateBatch> {
        self.check_process()?;
        let plan = self.engine().plan(input, spec, options.precision)?;
        let alone = || {
            let _inside = Inside::enter(&self.protocol.work);
            let options = EncodeOptions {
                precision: options.precision,
                interrupt: options.interrupt,
                validate_now: true,
                stream: None,
                leave_overdue: true,
            };
            self.engine().encode_with(input, spec, &options)
        };
        if self.is_large(input, &plan) || Inside::is(&self.protocol.work) {
            self.count_direct()?;
            if options.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(Error::DeadlineExceeded);
            }
            return alone();
        }
        let key = Key(plan);
        let request = Self::request(key.clone(), input, options);
        let ask = options.interrupt.map(|interrupt| {
            move || {
                let _inside = Inside::enter(&self.protocol.work);
                interrupt()
            }
        });
        let prepare = || {
            self.start_worker()?;
            let is_there = self.worker.lock().is_some();
            if is_there { Ok(()) } else { Err(self.error(Failure::Closed)) }
        };
        let ask = ask.as_ref().map(|ask| protocol::Ask { prepare: &prepare, ask });
        let called = self.protocol.call(request, ask, alone, |buffer, rows| {
            BatchWork::write_input(&key, buffer, &rows, input)
        });
        match called {
            Ok(Called::Alone(states)) => states,
            Ok(Called::Shared(share)) => result(Ok(share), self.config.queue),
            Err(failure) => Err(self.error(failure)),
        }
    }

    /// Queues a request, whose result is waited for later. The values are read before this returns
    /// unless the queue is full, or the request is larger than a batch: do not change them before
    /// the result is there.
    ///
    /// # Errors
    ///
    /// Those of [`Batcher::encode`]; most of what is wrong with the request is said here.
    pub fn submit(
        &self,
        input: OwnedInput,
        spec: &EncodeSpec,
        options: &RequestOptions,
    ) -> Result<Request> {
        self.submit_with(&mut Some(input), spec, options, None)
    }

    /// Queues a request, whose result is delivered to `listener` under the name of `token`, unless
    /// this fails or the request is cancelled. The input is left in its place where it was read
    /// already, to be dropped wherever is best.
    ///
    /// # Errors
    ///
    /// As for [`Batcher::submit`].
    pub fn submit_to(
        &self,
        input: &mut Option<OwnedInput>,
        spec: &EncodeSpec,
        options: &RequestOptions,
        listener: Arc<dyn Listener>,
        token: u64,
    ) -> Result<Request> {
        self.submit_with(input, spec, options, Some(Listening { listener, token }))
    }

    /// Encodes what waits, where a request said so ([`Request::is_to_be_led`]) and nobody else has
    /// begun meanwhile. What takes long is left to another thread.
    pub fn lead(&self) {
        if !self.is_forked() {
            self.protocol.lead_promised();
        }
    }

    fn submit_with(
        &self,
        owned: &mut Option<OwnedInput>,
        spec: &EncodeSpec,
        options: &RequestOptions,
        listening: Option<Listening>,
    ) -> Result<Request> {
        self.check_process()?;
        let input = match owned {
            Some(owned) => owned.input(),
            None => return Err(Error::invalid("input", "some", "none")),
        };
        let plan = self.engine().plan(&input, spec, options.precision)?;
        if self.is_large(&input, &plan) {
            self.count_direct()?;
            return self.dispatch(owned, spec, options, listening);
        }
        self.start_worker()?;
        let key = Key(plan);
        let request = Self::request(key.clone(), &input, options);
        let promises = listening.as_ref().is_some_and(|told| told.listener.leads());
        let ticket = self.protocol.submit(
            request,
            listening,
            promises,
            owned,
            |owned, buffer, rows| match owned {
                Some(owned) => BatchWork::write_input(&key, buffer, &rows, &owned.input()),
                None => Ok(()),
            },
            Option::take,
        );
        let (ticket, to_be_led) = ticket.map_err(|failure| self.error(failure))?;
        let (protocol, process) = (Arc::clone(&self.protocol), self.process);
        Ok(Request { kind: Kind::Queued { protocol, ticket, process }, to_be_led })
    }

    /// Encodes a large request on the engine's dispatch thread; one on a device, at the call.
    fn dispatch(
        &self,
        owned: &mut Option<OwnedInput>,
        spec: &EncodeSpec,
        options: &RequestOptions,
        listening: Option<Listening>,
    ) -> Result<Request> {
        let Some(input) = owned.take() else {
            return Err(Error::invalid("input", "some", "none"));
        };
        let encode_options = EncodeOptions {
            precision: options.precision,
            validate_now: true,
            leave_overdue: true,
            ..EncodeOptions::default()
        };
        let (engine, spec, deadline) = (self.engine().clone(), spec.clone(), options.deadline);
        let encode = move || {
            if deadline.is_some_and(|deadline| deadline < Instant::now()) {
                return Err(Error::DeadlineExceeded);
            }
            engine.encode_with(&input.input(), &spec, &encode_options)
        };
        let kind = match listening {
            None => Kind::Dispatched(self.engine().dispatch(encode)),
            Some(Listening { listener, token }) => Kind::Told(self.engine().dispatch(move || {
                listener.deliver(vec![(token, crate::pipeline::dispatch::catch(encode))]);
                Ok(())
            })),
        };
        Ok(Request { kind, to_be_led: false })
    }

    /// Takes no more requests, waits until those that wait are encoded, and ends the worker. Called
    /// in the middle of this batcher's own work, by a listener or a signal's handler, it waits for
    /// nothing. Requests larger than a batch are the engine's, and not waited for.
    pub fn close(&self) {
        if self.is_forked() {
            return;
        }
        let is_worker =
            |worker: &JoinHandle<()>| worker.thread().id() == std::thread::current().id();
        let own = self.worker.lock().as_ref().is_some_and(is_worker);
        self.protocol.close(!own && !Inside::is(&self.protocol.work));
        self.protocol.stop();
        let worker = self.worker.lock().take();
        if let Some(worker) = worker.filter(|_| !own && !Inside::is(&self.protocol.work)) {
            let _ = worker.join(); // what it panicked about was reported when it did
        }
    }

    fn is_large(&self, input: &Input<'_>, plan: &crate::plan::EncodePlan) -> bool {
        let rows = input.batch();
        let alone = input.device() != Device::Cpu || input.affine().is_some();
        alone || rows == 0 || rows > self.protocol.work.max_rows(plan)
    }

    fn request(
        key: Key,
        input: &Input<'_>,
        options: &RequestOptions,
    ) -> protocol::Request<BatchWork> {
        let (level, deadline) = (options.priority, options.deadline);
        protocol::Request { key, level, rows: input.batch(), deadline }
    }

    fn start_worker(&self) -> Result<()> {
        let mut worker = self.worker.lock();
        if worker.is_none() && !self.protocol.is_closed() {
            let protocol = Arc::clone(&self.protocol);
            let thread = std::thread::Builder::new().name("qdp-batcher".to_owned());
            let started = thread.spawn(move || protocol.work()).map_err(|error| {
                Error::Panicked { message: format!("no thread for a batcher: {error}") }
            })?;
            *worker = Some(started);
        }
        Ok(())
    }

    /// The threads and locks of a batcher stay behind where a process is forked.
    fn is_forked(&self) -> bool {
        !self.process.is_current()
    }

    fn check_process(&self) -> Result<()> {
        if self.is_forked() {
            let reason = "belongs to the process that this one was forked from";
            return Err(Error::BatcherClosed { reason });
        }
        Ok(())
    }

    fn error(&self, failure: Failure<Error>) -> Error {
        error(failure, self.config.queue)
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.close();
    }
}

fn error(failure: Failure<Error>, queue: usize) -> Error {
    match failure {
        Failure::Full => Error::QueueFull { queue },
        Failure::Expired => Error::DeadlineExceeded,
        Failure::Cancelled => Error::Cancelled,
        Failure::Closed => Error::BatcherClosed { reason: "is closed" },
        Failure::Failed(error) => error,
    }
}

/// A request's own states, or why it has none.
fn result(outcome: Outcome<BatchWork>, queue: usize) -> Result<StateBatch> {
    let (output, rows): (Output, Range<usize>) =
        outcome.map_err(|failure| error(failure, queue))?;
    let own = output.refused.iter().find(|(row, _)| rows.contains(row));
    if let Some((row, error)) = own {
        return Err(error.clone().about_sample(row - rows.start));
    }
    output.states?.slice(rows)
}

/// An asynchronous request.
///
/// Dropping it does not cancel it.
#[must_use = "cancel it or wait for it"]
pub struct Request {
    kind: Kind,
    to_be_led: bool,
}

enum Kind {
    Queued {
        protocol: Arc<Protocol<BatchWork>>,
        ticket: Arc<Ticket<BatchWork>>,
        process: Process,
    },
    Dispatched(Dispatched<StateBatch>),
    /// The listener has the result.
    Told(Dispatched<()>),
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

impl Request {
    /// Whether its listener, who said that it would ([`Listener::leads`]), is to call
    /// [`Batcher::lead`].
    pub fn is_to_be_led(&self) -> bool {
        self.to_be_led
    }

    /// Whether it is done, failed or cancelled.
    pub fn is_done(&self) -> bool {
        match &self.kind {
            Kind::Queued { ticket, process, .. } => process.is_current() && ticket.is_done(),
            Kind::Dispatched(dispatched) => dispatched.is_done(),
            Kind::Told(dispatched) => dispatched.is_done(),
        }
    }

    /// Keeps the request from being encoded, if its batch has not started. Only the call that does
    /// so answers `true`; the result is [`Error::Cancelled`] then, and no listener is told.
    pub fn cancel(&self) -> bool {
        match &self.kind {
            Kind::Queued { protocol, ticket, process } => {
                process.is_current() && protocol.cancel(ticket)
            }
            Kind::Dispatched(dispatched) => dispatched.cancel(),
            Kind::Told(dispatched) => dispatched.cancel(),
        }
    }

    /// Waits for the request and returns its result.
    ///
    /// # Errors
    ///
    /// Those of [`Batcher::encode`]; [`Error::Cancelled`] where it was cancelled, its result was
    /// delivered to a listener, or it was left behind in the process that this one was forked from.
    pub fn wait(self) -> Result<StateBatch> {
        match self.kind {
            Kind::Queued { protocol, ticket, process } => {
                if !process.is_current() {
                    return Err(Error::Cancelled);
                }
                result(ticket.wait(), protocol.queue())
            }
            Kind::Dispatched(dispatched) => dispatched.wait(),
            Kind::Told(dispatched) => dispatched.wait().and(Err(Error::Cancelled)),
        }
    }
}
