//! The batcher's protocol under loom: every order in which threads may run, within a bound on
//! preemptions.
//!
//! The protocol's own source is compiled here against loom's primitives instead of those in
//! `batcher/sync.rs`. Rows are loom's cells, which finds whoever touches one without having seen
//! what others did to it. A thread that sleeps for ever is a deadlock, which loom reports. Time
//! does not pass here: nothing has a deadline, and the delay is zero.
#![allow(dead_code)] // what needs time is used elsewhere

#[allow(unreachable_pub)] // it is reached from outside in its own crate
#[path = "../../qdp-core/src/coalesce/batcher/protocol/mod.rs"]
mod protocol;

/// In the place of `batcher/sync.rs`.
mod sync {
    pub(super) use loom::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
    pub(super) use loom::sync::{Arc, MutexGuard};

    /// Looking again before sleeping adds orders but nothing that can happen in them.
    pub(super) fn look_until(_: impl Fn() -> bool) -> bool {
        false
    }

    pub(super) struct Mutex<T>(loom::sync::Mutex<T>);

    pub(super) struct Condvar(loom::sync::Condvar);

    impl<T> Mutex<T> {
        pub(super) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(super) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }

    impl Condvar {
        pub(super) fn new() -> Self {
            Self(loom::sync::Condvar::new())
        }

        pub(super) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
            self.0.wait(guard).unwrap()
        }

        pub(super) fn wait_until<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            _end: std::time::Instant,
        ) -> MutexGuard<'a, T> {
            self.wait(guard)
        }

        pub(super) fn notify_one(&self) {
            self.0.notify_one();
        }

        pub(super) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use protocol::{Ask, Called, Failure, Finished, Limits, Outcome, Protocol, Request, Ticket, Work};
use std::ops::Range;
use std::time::Duration;

/// What is in a row that nobody wrote.
const EMPTY: usize = usize::MAX;
/// A value that its request fails with.
const BAD: usize = 13;
/// A key whose batches take long.
const LONG: u8 = 7;
/// Rows of a batch.
const ROWS: usize = 2;

struct Rows([UnsafeCell<usize>; ROWS]);

// SAFETY: loom checks every access to the cells, which is what these tests are for.
unsafe impl Sync for Rows {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Rows {}

/// Copies rows. What is only noted is in std's locks and atomics, which order nothing here.
struct Copy {
    /// Loom's, as who takes a buffer has to see that it was given back.
    spare: loom::sync::Mutex<Vec<std::sync::Arc<Rows>>>,
    delivered: std::sync::Mutex<Vec<(usize, Option<usize>)>>,
    buffers: std::sync::atomic::AtomicUsize,
}

fn write(buffer: &Rows, rows: Range<usize>, value: usize) -> Result<(), &'static str> {
    for row in rows {
        // SAFETY: loom checks that nobody else is at the cell.
        buffer.0[row].with_mut(|cell| unsafe { *cell = value });
    }
    if value == BAD { Err("bad") } else { Ok(()) }
}

impl Work for Copy {
    type Key = u8;
    type Buffer = std::sync::Arc<Rows>;
    type Source = usize;
    type Listener = usize;
    type Output = std::sync::Arc<Vec<usize>>;
    type Error = &'static str;

    fn buffer(&self, _: &u8, _: usize) -> Result<(Self::Buffer, usize), &'static str> {
        let spare = self.spare.lock().unwrap().pop();
        let buffer = spare.unwrap_or_else(|| {
            self.buffers.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            std::sync::Arc::new(Rows(std::array::from_fn(|_| UnsafeCell::new(EMPTY))))
        });
        Ok((buffer, ROWS))
    }

    fn write(
        &self,
        _: &u8,
        buffer: &Self::Buffer,
        rows: Range<usize>,
        source: usize,
    ) -> Result<(), &'static str> {
        write(buffer, rows, source)
    }

    fn run(&self, key: &u8, buffer: &Self::Buffer, rows: usize, gather: bool) -> Self::Output {
        assert!(gather || *key != LONG, "whoever promised to lead took what is long");
        let take = |row: usize| {
            // SAFETY: as in `write`.
            buffer.0[row].with_mut(|cell| unsafe { std::mem::replace(&mut *cell, EMPTY) })
        };
        let values: Vec<usize> = (0..rows).map(take).collect();
        assert!(values.iter().all(|&value| value != EMPTY), "a row was not written");
        std::sync::Arc::new(values)
    }

    fn is_short(&self, key: &u8, _: usize) -> bool {
        *key != LONG
    }

    fn recycle(&self, buffer: &Self::Buffer, _: bool) {
        self.spare.lock().unwrap().push(std::sync::Arc::clone(buffer));
    }

    fn discard(&self, _: Vec<usize>) {}

    fn deliver(&self, finished: Vec<Finished<Self>>) {
        let mut delivered = self.delivered.lock().unwrap();
        for Finished { listener, outcome } in finished {
            delivered.push((listener, value(outcome).ok()));
        }
    }
}

fn value(outcome: Outcome<Copy>) -> Result<usize, Failure<&'static str>> {
    outcome.map(|(output, rows)| output[rows.start])
}

fn protocol(queue: usize, refuse: bool) -> Arc<Protocol<Copy>> {
    let work = Copy {
        spare: loom::sync::Mutex::new(Vec::new()),
        delivered: std::sync::Mutex::default(),
        buffers: std::sync::atomic::AtomicUsize::new(0),
    };
    let limits = Limits { delay: Duration::ZERO, queue, refuse };
    Arc::new(Protocol::new(work, limits, 0))
}

fn request(key: u8) -> Request<Copy> {
    Request { key, level: 0, rows: 1, deadline: None }
}

/// Encodes a value as a caller.
fn call(protocol: &Protocol<Copy>, key: u8, own: usize) -> Result<usize, Failure<&'static str>> {
    let alone = || if own == BAD { Err("bad") } else { Ok(own) };
    match protocol
        .call(request(key), None::<Ask<'_, _>>, alone, |buffer, rows| write(buffer, rows, own))?
    {
        Called::Alone(result) => result.map_err(Failure::Failed),
        Called::Shared(share) => value(Ok(share)),
    }
}

fn caller(
    protocol: &Arc<Protocol<Copy>>,
    key: u8,
    own: usize,
) -> thread::JoinHandle<Result<usize, Failure<&'static str>>> {
    let protocol = Arc::clone(protocol);
    thread::spawn(move || call(&protocol, key, own))
}

fn worker(protocol: &Arc<Protocol<Copy>>) -> thread::JoinHandle<()> {
    let protocol = Arc::clone(protocol);
    thread::spawn(move || protocol.work())
}

type Submitted = Result<(Arc<Ticket<Copy>>, bool), Failure<&'static str>>;

/// Queues a value for its listener, which goes by the value; who `promises` is told whether to lead.
fn submit(protocol: &Protocol<Copy>, own: usize, promises: bool) -> Submitted {
    submit_to(protocol, 0, own, promises)
}

fn submit_to(protocol: &Protocol<Copy>, key: u8, own: usize, promises: bool) -> Submitted {
    let write = |own: &usize, buffer: &std::sync::Arc<Rows>, rows| write(buffer, rows, *own);
    protocol.submit(request(key), Some(own), promises, own, write, |own| own)
}

/// Closes the protocol and lets its worker go: what was delivered, in the order of the values.
fn end(protocol: &Protocol<Copy>, worker: thread::JoinHandle<()>) -> Vec<(usize, Option<usize>)> {
    protocol.close(true);
    protocol.stop();
    worker.join().unwrap();
    let mut delivered = protocol.work.delivered.lock().unwrap().clone();
    delivered.sort_unstable();
    delivered
}

/// Runs `test` in all orders with up to so many preemptions.
fn model(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(test);
}

/// Nothing waits, and every buffer that was made is there again.
fn assert_at_rest(protocol: &Protocol<Copy>) {
    assert_eq!(protocol.waiting(), 0);
    let made = protocol.work.buffers.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(protocol.work.spare.lock().unwrap().len(), made, "a buffer was lost");
}

#[test]
fn callers_get_their_own_values() {
    model(3, || {
        let protocol = protocol(8, false);
        let others = [caller(&protocol, 0, 1), caller(&protocol, 0, 2)];
        assert_eq!(call(&protocol, 0, 3), Ok(3));
        assert_eq!(others.map(|other| other.join().unwrap()), [Ok(1), Ok(2)]);
        assert_eq!(protocol.stats().requests, 3);
        assert_at_rest(&protocol);
    });
}

#[test]
fn keys_do_not_mix() {
    model(3, || {
        let protocol = protocol(8, false);
        let others = [caller(&protocol, 0, 1), caller(&protocol, 1, 2)];
        assert_eq!(call(&protocol, 0, 3), Ok(3));
        assert_eq!(others.map(|other| other.join().unwrap()), [Ok(1), Ok(2)]);
        assert_at_rest(&protocol);
    });
}

/// One fails by itself, whether it leads, is to lead, or is led.
#[test]
fn a_bad_request_fails_alone() {
    model(3, || {
        let protocol = protocol(8, false);
        let others = [caller(&protocol, 0, BAD), caller(&protocol, 0, 2)];
        assert_eq!(call(&protocol, 0, 3), Ok(3));
        assert_eq!(others.map(|other| other.join().unwrap()), [Err(Failure::Failed("bad")), Ok(2)]);
        assert_at_rest(&protocol);
    });
}

/// Only one may wait: others are parked, and come in turn.
#[test]
fn a_full_queue_lets_everybody_in_at_last() {
    model(3, || {
        let protocol = protocol(1, false);
        let others = [caller(&protocol, 0, 1), caller(&protocol, 0, 2), caller(&protocol, 0, 4)];
        assert_eq!(call(&protocol, 0, 3), Ok(3));
        assert_eq!(others.map(|other| other.join().unwrap()), [Ok(1), Ok(2), Ok(4)]);
        assert_at_rest(&protocol);
    });
}

#[test]
fn a_full_queue_refuses_and_no_more() {
    model(3, || {
        let protocol = protocol(1, true);
        let others = [caller(&protocol, 0, 1), caller(&protocol, 0, 2)];
        let mut results = others.map(|other| other.join().unwrap()).to_vec();
        results.push(call(&protocol, 0, 3));
        let refused = results.iter().filter(|result| **result == Err(Failure::Full)).count();
        assert!(refused <= 1 && results[2] == Ok(3));
        assert_eq!(protocol.stats().refused, refused as u64);
        assert_at_rest(&protocol);
    });
}

/// The worker leads what nobody waits for in a call; every result is delivered once.
#[test]
fn what_is_submitted_is_delivered_once() {
    model(3, || {
        let protocol = protocol(8, false);
        let worker = worker(&protocol);
        let other = caller(&protocol, 0, 1);
        for own in [5, 6] {
            assert!(submit(&protocol, own, false).is_ok());
        }
        assert_eq!(other.join().unwrap(), Ok(1));
        assert_eq!(end(&protocol, worker), [(5, Some(5)), (6, Some(6))]);
        assert_at_rest(&protocol);
    });
}

/// Whoever submits leads, unless a caller or the worker is first.
#[test]
fn a_promise_is_kept_by_somebody() {
    model(3, || {
        let protocol = protocol(8, false);
        let worker = worker(&protocol);
        let other = caller(&protocol, 0, 1);
        let mut leads = false;
        for own in [5, 6] {
            leads |= submit(&protocol, own, true).is_ok_and(|(_, leads)| leads);
        }
        if leads {
            protocol.lead_promised();
        }
        assert_eq!(other.join().unwrap(), Ok(1));
        assert_eq!(end(&protocol, worker), [(5, Some(5)), (6, Some(6))]);
        assert_at_rest(&protocol);
    });
}

/// Whoever promised to lead leaves to the worker what is long, though it came while it led.
#[test]
fn a_promise_is_of_what_is_short() {
    model(3, || {
        let protocol = protocol(8, false);
        let worker = worker(&protocol);
        let other = Arc::clone(&protocol);
        let other = thread::spawn(move || {
            if submit_to(&other, LONG, 6, true).is_ok_and(|(_, leads)| leads) {
                other.lead_promised();
            }
        });
        if submit(&protocol, 5, true).is_ok_and(|(_, leads)| leads) {
            protocol.lead_promised();
        }
        other.join().unwrap();
        assert_eq!(end(&protocol, worker), [(5, Some(5)), (6, Some(6))]);
        assert_at_rest(&protocol);
    });
}

/// A promise that is broken holds nobody up who waits.
#[test]
fn a_broken_promise_is_made_good() {
    model(3, || {
        let protocol = protocol(8, false);
        let worker = worker(&protocol);
        assert!(submit(&protocol, 5, true).is_ok_and(|(_, leads)| leads));
        let other = caller(&protocol, 1, 1);
        assert_eq!(call(&protocol, 0, 3), Ok(3));
        assert_eq!(other.join().unwrap(), Ok(1));
        assert_eq!(end(&protocol, worker), [(5, Some(5))]);
        assert_at_rest(&protocol);
    });
}

/// Whoever promised and then waits for room waits for the worker, not for itself.
#[test]
fn a_promise_is_not_waited_for_by_who_made_it() {
    model(3, || {
        let protocol = protocol(1, false);
        let worker = worker(&protocol);
        assert!(submit(&protocol, 5, true).is_ok_and(|(_, leads)| leads));
        assert_eq!(call(&protocol, 0, 3), Ok(3));
        assert_eq!(end(&protocol, worker), [(5, Some(5))]);
        assert_at_rest(&protocol);
    });
}

/// With room for one request, the second is parked and written by who leads; the third is bad.
#[test]
fn what_is_parked_is_delivered_once() {
    model(3, || {
        let protocol = protocol(1, false);
        let worker = worker(&protocol);
        let mut ends = Vec::new();
        for own in [5, 6, BAD] {
            ends.push(submit(&protocol, own, false).map(|(ticket, _)| ticket.wait()));
        }
        let delivered = end(&protocol, worker);
        let mut expected = vec![(5, Some(5)), (6, Some(6))];
        match ends.pop() {
            // It was said at the call, or else to its listener.
            Some(Err(Failure::Failed("bad"))) => {}
            Some(Ok(Err(Failure::Failed("bad")))) => expected.push((BAD, None)),
            _ => panic!("a bad request did not fail"),
        }
        assert_eq!(delivered, expected);
        assert_at_rest(&protocol);
    });
}

/// Of whoever cancels and whoever starts, one gets the request.
#[test]
fn a_request_is_cancelled_or_delivered() {
    for queue in [1, 8] {
        model(3, move || {
            let protocol = protocol(queue, false);
            let worker = worker(&protocol);
            let mut cancelled = Vec::new();
            let tickets = [5, 6].map(|own| submit(&protocol, own, false));
            for ticket in &tickets {
                let Ok((ticket, _)) = ticket else { panic!("it was not taken") };
                cancelled.push(protocol.cancel(ticket));
                assert!(!protocol.cancel(ticket), "cancelled twice");
            }
            let delivered = end(&protocol, worker);
            let own = [5, 6].into_iter().zip(cancelled);
            let expected: Vec<_> =
                own.filter(|(_, cancelled)| !cancelled).map(|(own, _)| (own, Some(own))).collect();
            assert_eq!(delivered, expected);
            for (ticket, _) in tickets.into_iter().flatten() {
                assert!(ticket.is_done());
            }
            assert_at_rest(&protocol);
        });
    }
}

#[test]
fn closing_waits_for_who_is_in_and_refuses_who_is_not() {
    model(3, || {
        let protocol = protocol(8, false);
        let others = [caller(&protocol, 0, 1), caller(&protocol, 0, 2)];
        protocol.close(true);
        let encoded = protocol.stats().requests;
        assert_eq!(call(&protocol, 0, 3), Err(Failure::Closed));
        let results = others.map(|other| other.join().unwrap());
        let refused = results.iter().filter(|result| **result == Err(Failure::Closed)).count();
        for (result, own) in results.into_iter().zip([1, 2]) {
            assert!(matches!(result, Err(Failure::Closed)) || result == Ok(own));
        }
        assert_eq!(encoded as usize + refused, 2, "somebody came in after the end");
        assert_at_rest(&protocol);
    });
}

/// Whoever encodes alone and panics lets the next lead.
#[test]
fn a_panic_hands_leadership_over() {
    model(3, || {
        let protocol = protocol(8, false);
        let own = Arc::clone(&protocol);
        let bad = thread::spawn(move || {
            let alone = || std::panic::resume_unwind(Box::new(()));
            let called = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                own.call::<()>(request(0), None, alone, |_, _| {
                    std::panic::resume_unwind(Box::new(()))
                })
            }));
            assert!(called.is_err());
        });
        let good = caller(&protocol, 1, 2);
        assert_eq!(call(&protocol, 1, 3), Ok(3));
        assert_eq!(good.join().unwrap(), Ok(2));
        bad.join().unwrap();
        assert_eq!(protocol.waiting(), 0);
    });
}
