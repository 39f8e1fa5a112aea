//! Asynchronous work: one job after another on a thread of the engine's own.
//!
//! The thread starts with the first job. Jobs run in the order in which they were dispatched, and
//! each is done, cancelled or failed exactly once: whoever takes it out of its task, the thread to
//! run it or somebody to cancel it, is the only one to have it.
//!
//! A job holds the engine that it needs. Dropping the last handle of an engine therefore lets the
//! jobs dispatched so far finish; the last of them takes the engine along, on the thread itself,
//! and the thread, which nobody joins, ends as its queue has no sender any more. Dropping a future
//! does not cancel its job.
//!
//! A process forked from this one has no such thread. There a job runs at its call, and a future
//! from before the fork that was not done will not be: waiting for it fails.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::state::StateBatch;
use parking_lot::{Condvar, Mutex};
use std::any::Any;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

/// The states of an encode that runs asynchronously.
pub type EncodeFuture = Dispatched<StateBatch>;

type Job<T> = Box<dyn FnOnce() -> Result<T> + Send>;

/// What somebody waits for.
enum Stage<T> {
    Queued(Job<T>),
    Running,
    Done(Result<T>),
    /// The result was handed over.
    Taken,
}

struct State<T> {
    stage: Stage<T>,
    waker: Option<Waker>,
}

/// A job and its result: what the queue and the future share.
struct Task<T> {
    state: Mutex<State<T>>,
    done: Condvar,
    process: u32,
}

/// A task, whatever its result.
trait Run: Send + Sync {
    /// Runs the job, unless it was cancelled. Does not panic.
    fn run(&self);
}

impl<T> Task<T> {
    fn new(stage: Stage<T>) -> Arc<Self> {
        let state = Mutex::new(State { stage, waker: None });
        Arc::new(Self { state, done: Condvar::new(), process: std::process::id() })
    }

    /// The job, for whoever asks first.
    fn take(&self) -> Option<Job<T>> {
        let mut state = self.state.lock();
        match std::mem::replace(&mut state.stage, Stage::Running) {
            Stage::Queued(job) => Some(job),
            other => {
                state.stage = other;
                None
            }
        }
    }

    fn finish(&self, result: Result<T>) {
        let waker = {
            let mut state = self.state.lock();
            state.stage = Stage::Done(result);
            self.done.notify_all();
            state.waker.take()
        };
        // The executor's code: not under the lock, and its panics are its own.
        if let Some(waker) = waker {
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
    }
}

impl<T> State<T> {
    fn result(&mut self) -> Option<Result<T>> {
        match std::mem::replace(&mut self.stage, Stage::Taken) {
            Stage::Done(result) => Some(result),
            other => {
                self.stage = other;
                None
            }
        }
    }
}

impl<T: Send> Run for Task<T> {
    fn run(&self) {
        if let Some(job) = self.take() {
            self.finish(catch(job));
        }
    }
}

/// Runs `work`; a panic becomes [`Error::Panicked`].
pub fn catch<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    // Whatever the work had hold of is dropped by the unwinding.
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Error::Panicked { message: message(&*panic) }))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

/// The result of work on an engine's own thread: waited for, or awaited with any executor.
///
/// Dropping it does not cancel the work.
#[must_use = "cancel it, wait for it or await it"]
pub struct Dispatched<T> {
    task: Arc<Task<T>>,
}

impl<T> fmt::Debug for Dispatched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatched").field("done", &self.is_done()).finish_non_exhaustive()
    }
}

impl<T> Dispatched<T> {
    /// Work that was done at the call.
    pub(crate) fn done(result: Result<T>) -> Self {
        Self { task: Task::new(Stage::Done(result)) }
    }

    /// Whether the work is done, failed or cancelled.
    pub fn is_done(&self) -> bool {
        matches!(self.task.state.lock().stage, Stage::Done(_) | Stage::Taken)
    }

    /// Whether the work has begun and is not done.
    pub fn is_running(&self) -> bool {
        matches!(self.task.state.lock().stage, Stage::Running)
    }

    /// Keeps the work from starting, if it has not started. Only the call that does so answers
    /// `true`; the result is [`Error::Cancelled`] then, and whatever the work held is let go.
    pub fn cancel(&self) -> bool {
        let Some(job) = self.task.take() else { return false };
        // First, so that nobody learns of the end while the job's data is still held. What a
        // destructor of the data's owner panics about is no reason to leave others waiting.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(job)));
        self.task.finish(Err(Error::Cancelled));
        true
    }

    /// Waits for the work and returns its result.
    ///
    /// # Errors
    ///
    /// Those of the work; [`Error::Panicked`] where it panicked; [`Error::Cancelled`] where it was
    /// cancelled, or left behind in the process that this one was forked from.
    pub fn wait(self) -> Result<T> {
        let mut state = self.task.state.lock();
        loop {
            if let Some(result) = state.result() {
                return result;
            }
            if self.task.process != std::process::id() {
                return Err(Error::Cancelled);
            }
            self.task.done.wait(&mut state);
        }
    }
}

impl<T> Future for Dispatched<T> {
    type Output = Result<T>;

    /// # Panics
    ///
    /// Where it is asked again after it was ready.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.task.state.lock();
        if let Some(result) = state.result() {
            return Poll::Ready(result);
        }
        assert!(!matches!(state.stage, Stage::Taken), "polled after it was ready");
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

/// The thread of one engine, once there was work for it.
#[derive(Default)]
pub(crate) struct Dispatcher {
    worker: OnceLock<Option<Worker>>,
}

/// The way to a running thread.
struct Worker {
    /// `None` only while this is dropped.
    queue: Option<Sender<Arc<dyn Run>>>,
    process: u32,
}

impl Dispatcher {
    /// Runs `work` on the thread, after everything that was dispatched before.
    pub(crate) fn dispatch<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Dispatched<T> {
        let task = Task::new(Stage::Queued(Box::new(work)));
        let worker = self.worker.get_or_init(Worker::start).as_ref();
        match worker.filter(|worker| worker.process == std::process::id()) {
            Some(worker) => worker.send(Arc::clone(&task) as Arc<dyn Run>),
            None => task.run(),
        }
        Dispatched { task }
    }
}

impl Worker {
    /// `None` where the system has no thread to give.
    fn start() -> Option<Self> {
        let (queue, tasks) = channel();
        let started =
            std::thread::Builder::new().name("qdp-dispatch".to_owned()).spawn(|| work_off(tasks));
        if let Err(error) = started {
            tracing::warn!(
                "no thread for asynchronous encodes, so they run at their calls: {error}"
            );
            return None;
        }
        Some(Self { queue: Some(queue), process: std::process::id() })
    }

    fn send(&self, task: Arc<dyn Run>) {
        if let Some(queue) = &self.queue
            && let Err(unsent) = queue.send(task)
        {
            // The thread does not end while there is a sender, so this is not reached; a job that
            // nobody runs would be worse than one that runs here.
            unsent.0.run();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            // A fork may have copied the channel while its locks were held, by a thread that is
            // not here to let go of them.
            std::mem::forget(self.queue.take());
        }
    }
}

fn work_off(tasks: Receiver<Arc<dyn Run>>) {
    for task in tasks {
        task.run();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{EncodeSpec, Encoding};
    use crate::engine::{Device, EncodeOptions, Engine};
    use crate::input::OwnedInput;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;
    use std::thread::Thread;

    /// Holds the thread until the sender is dropped or sends.
    fn gate(dispatcher: &Dispatcher) -> (Sender<()>, Dispatched<()>) {
        let (open, closed) = channel();
        let gate = dispatcher.dispatch(move || {
            let _ = closed.recv();
            Ok(())
        });
        (open, gate)
    }

    fn block_on<F: Future + Unpin>(mut future: F) -> F::Output {
        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Arc::new(Unpark(std::thread::current())).into();
        let mut context = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(output) = Pin::new(&mut future).poll(&mut context) {
                return output;
            }
            std::thread::park();
        }
    }

    proptest! {
        /// What is cancelled never runs; everything else runs once, in order.
        #[test]
        fn jobs_run_in_order_or_not_at_all(
            cancelled in prop::collection::vec(any::<bool>(), 0..40),
            awaited in any::<bool>(),
        ) {
            let dispatcher = Dispatcher::default();
            let (open, gate) = gate(&dispatcher);
            let ran = Arc::new(Mutex::new(Vec::new()));
            let futures: Vec<_> = (0..cancelled.len())
                .map(|job| {
                    let ran = Arc::clone(&ran);
                    dispatcher.dispatch(move || {
                        ran.lock().push(job);
                        Ok(job)
                    })
                })
                .collect();
            for (future, &cancel) in futures.iter().zip(&cancelled) {
                prop_assert!(!future.is_done());
                prop_assert_eq!(cancel && future.cancel(), cancel);
                prop_assert!(!cancel || !future.cancel(), "cancelled twice");
                prop_assert_eq!(future.is_done(), cancel);
            }
            drop(open);
            gate.wait().unwrap();
            for (job, (future, &cancel)) in futures.into_iter().zip(&cancelled).enumerate() {
                let result = if awaited { block_on(future) } else { future.wait() };
                prop_assert_eq!(result, if cancel { Err(Error::Cancelled) } else { Ok(job) });
            }
            let kept = (0..cancelled.len()).filter(|&job| !cancelled[job]);
            prop_assert_eq!(&*ran.lock(), &kept.collect::<Vec<_>>());
        }
    }

    /// Of the thread and everybody who cancels, exactly one gets the job.
    #[test]
    fn a_job_is_run_or_cancelled_once() {
        let dispatcher = Dispatcher::default();
        let rounds = if cfg!(miri) { 10 } else { 200 };
        for _ in 0..rounds {
            let ran = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&ran);
            let future = dispatcher.dispatch(move || {
                count.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
            let cancelled = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| cancelled.fetch_add(future.cancel().into(), Ordering::Relaxed));
                }
            });
            let cancelled = cancelled.into_inner();
            assert_eq!(future.wait(), if cancelled == 1 { Err(Error::Cancelled) } else { Ok(()) });
            assert_eq!(ran.load(Ordering::Relaxed) + cancelled, 1);
        }
    }

    #[test]
    fn a_panic_is_the_futures_error_and_the_thread_goes_on() {
        let dispatcher = Dispatcher::default();
        let bad = dispatcher.dispatch(|| -> Result<()> { panic!("job {}", 7) });
        let good = dispatcher.dispatch(|| Ok(std::thread::current().name().map(str::to_owned)));
        assert_eq!(bad.wait(), Err(Error::Panicked { message: "job 7".to_owned() }));
        assert_eq!(good.wait().unwrap().as_deref(), Some("qdp-dispatch"));
    }

    #[test]
    fn a_panic_in_the_owners_destructor_leaves_nobody_waiting() {
        struct Bad;
        impl Drop for Bad {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        let dispatcher = Dispatcher::default();
        let (open, _gate) = gate(&dispatcher);
        let held = Bad;
        let future = dispatcher.dispatch(move || {
            let _held = held;
            Ok(())
        });
        assert!(future.cancel());
        drop(open);
        assert_eq!(future.wait(), Err(Error::Cancelled));
    }

    fn engine() -> Engine {
        Engine::open(Device::Cpu).unwrap()
    }

    fn encode(engine: &Engine, values: Vec<f64>) -> EncodeFuture {
        let spec = EncodeSpec::new(Encoding::Amplitude, 1).unwrap();
        engine.encode_async(OwnedInput::sample(values), spec, EncodeOptions::default())
    }

    #[test]
    fn encodes_outlive_their_engine() {
        let engine = engine();
        let (open, closed) = channel::<()>();
        let gate = engine.dispatch(move || {
            let _ = closed.recv();
            Ok(())
        });
        let (last, future) = (encode(&engine, vec![3.0, 4.0]), encode(&engine, vec![1.0, 0.0]));
        drop(engine);
        drop(open);
        drop(future);
        // The last handle of the engine goes on its own thread.
        let states = last.wait().unwrap();
        assert!((states.as_slice::<f64>().unwrap()[1].re - 0.8).abs() < 1e-15);
        gate.wait().unwrap();
    }

    #[test]
    fn errors_come_through_the_future() {
        let engine = engine();
        let zero = encode(&engine, vec![0.0, 0.0]);
        let long = encode(&engine, vec![1.0; 3]);
        assert_eq!(zero.wait().unwrap_err(), Error::ZeroNorm { sample: 0 });
        assert!(matches!(long.wait().unwrap_err(), Error::FeatureCount { got: 3, .. }));
    }

    #[test]
    fn input_is_let_go_before_the_future_is_done() {
        let engine = engine();
        let values: Arc<[f64]> = Arc::from([1.0, 1.0]);
        let spec = EncodeSpec::new(Encoding::Amplitude, 1).unwrap();
        for cancel in [false, true] {
            let (open, closed) = channel::<()>();
            let gate = engine.dispatch(move || {
                let _ = closed.recv();
                Ok(())
            });
            let input = OwnedInput::rows(Arc::clone(&values), 2).unwrap();
            let future = engine.encode_async(input, spec.clone(), EncodeOptions::default());
            assert_eq!(Arc::strong_count(&values), 2);
            assert_eq!(cancel && future.cancel(), cancel);
            drop(open);
            assert_eq!(future.wait().is_ok(), !cancel);
            assert_eq!(Arc::strong_count(&values), 1);
            gate.wait().unwrap();
        }
    }
}
