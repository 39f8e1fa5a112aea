//! Batches of the CPU backend: who shares one, in what order they start, who fails.

use super::*;
use crate::encoding::Encoding;
use proptest::prelude::*;
use std::sync::Weak;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// Long enough that nothing starts by itself.
const NEVER: Duration = Duration::from_mins(1);

type Results = Vec<(u64, Result<StateBatch>)>;

/// Notes the batches that are delivered.
#[derive(Default)]
struct Batches(Mutex<Vec<Results>>);

impl Listener for Batches {
    fn deliver(&self, results: Results) {
        self.0.lock().push(results);
    }
}

fn engine() -> Engine {
    Engine::open(Device::Cpu).unwrap()
}

fn batcher(config: BatcherConfig) -> Batcher {
    Batcher::new(&engine(), config).unwrap()
}

/// One that collects until it is closed.
fn collecting() -> Batcher {
    batcher(BatcherConfig { max_delay: NEVER, ..BatcherConfig::default() })
}

fn amplitude(num_qubits: u32) -> EncodeSpec {
    EncodeSpec::new(Encoding::Amplitude, num_qubits).unwrap()
}

/// Values that differ between requests.
fn values(token: u64, rows: usize, features: usize) -> Vec<f64> {
    (0..rows * features).map(|i| 1.0 + token as f64 + (i * i) as f64).collect()
}

fn listener(batches: &Arc<Batches>) -> Arc<dyn Listener> {
    Arc::clone(batches) as Arc<dyn Listener>
}

proptest! {
    /// Requests share a batch where plan and priority are the same; higher priorities start first,
    /// then older batches; each gets the bits that it would get alone.
    #[test]
    fn batches_are_grouped_and_ordered(
        requests in prop::collection::vec((1_u32..4, 0_i32..3, 1_usize..4, any::<bool>()), 1..40),
    ) {
        let batcher = collecting();
        let batches = Arc::new(Batches::default());
        // By plan and priority, in the order of the first request.
        let mut expected: Vec<((u32, bool, i32), Vec<u64>)> = Vec::new();
        for (token, &(n, priority, rows, single)) in (0..).zip(&requests) {
            let features = 1 << n;
            let values = values(token, rows, features);
            let input = if single {
                let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
                OwnedInput::rows(values, features)
            } else {
                OwnedInput::rows(values, features)
            };
            let options = RequestOptions { priority, ..RequestOptions::default() };
            let told = listener(&batches);
            let mut input = Some(input.unwrap());
            let request =
                batcher.submit_to(&mut input, &amplitude(n), &options, told, token).unwrap();
            prop_assert!(!request.is_done());
            prop_assert!(input.is_some(), "it was read at the call");
            let group = (n, single, priority);
            match expected.iter_mut().find(|(other, _)| *other == group) {
                Some((_, tokens)) => tokens.push(token),
                None => expected.push((group, vec![token])),
            }
        }
        prop_assert_eq!(batcher.waiting(), requests.len());
        batcher.close();
        expected.sort_by_key(|((.., priority), _)| -priority);
        let delivered = std::mem::take(&mut *batches.0.lock());
        let tokens: Vec<Vec<u64>> =
            delivered.iter().map(|batch| batch.iter().map(|(token, _)| *token).collect()).collect();
        let expected: Vec<Vec<u64>> = expected.into_iter().map(|(_, tokens)| tokens).collect();
        prop_assert_eq!(&tokens, &expected);
        for (token, states) in delivered.into_iter().flatten() {
            let (n, _, rows, single) = requests[token as usize];
            let values = values(token, rows, 1 << n);
            let spec = amplitude(n);
            let states = states.unwrap();
            prop_assert_eq!(states.batch(), rows);
            if single {
                let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
                let alone = engine().encode(&Input::rows(&values, 1 << n).unwrap(), &spec, None);
                let alone = alone.unwrap();
                prop_assert_eq!(states.as_slice::<f32>(), alone.as_slice::<f32>());
            } else {
                let alone = engine().encode(&Input::rows(&values, 1 << n).unwrap(), &spec, None);
                let alone = alone.unwrap();
                prop_assert_eq!(states.as_slice::<f64>(), alone.as_slice::<f64>());
            }
        }
        let stats = batcher.stats();
        prop_assert_eq!(stats.requests, requests.len() as u64);
        prop_assert_eq!((stats.batches, stats.started_close), (expected.len() as u64, stats.batches));
        prop_assert_eq!(batcher.waiting(), 0);
    }

    /// A batch has no more samples than it may, and starts when it is full.
    #[test]
    fn full_batches_start(
        rows in prop::collection::vec(1_usize..4, 1..30),
        most in 3_usize..7,
    ) {
        let config = BatcherConfig {
            max_delay: NEVER,
            max_batch_samples: most,
            ..BatcherConfig::default()
        };
        let batcher = batcher(config);
        let batches = Arc::new(Batches::default());
        let mut expected: Vec<(usize, Vec<u64>)> = Vec::new();
        for (token, &rows) in (0..).zip(&rows) {
            let input = OwnedInput::rows(values(token, rows, 2), 2).unwrap();
            let told = listener(&batches);
            let options = RequestOptions::default();
            let request =
                batcher.submit_to(&mut Some(input), &amplitude(1), &options, told, token);
            prop_assert!(request.is_ok());
            match expected.last_mut() {
                Some((held, tokens)) if *held + rows <= most => {
                    *held += rows;
                    tokens.push(token);
                }
                _ => expected.push((rows, vec![token])),
            }
        }
        batcher.close();
        let tokens: Vec<Vec<u64>> = batches.0.lock().iter()
            .map(|batch| batch.iter().map(|(token, _)| *token).collect())
            .collect();
        prop_assert_eq!(tokens, expected.iter().map(|(_, tokens)| tokens.clone()).collect::<Vec<_>>());
        let stats = batcher.stats();
        let open = u64::from(expected.last().is_some_and(|(held, _)| *held < most));
        prop_assert_eq!((stats.started_close, stats.batches), (open, expected.len() as u64));
    }
}

#[test]
fn a_lone_call_is_a_batch_of_its_own() {
    let batcher = batcher(BatcherConfig::default());
    for i in 1..4 {
        let sample = [f64::from(i), 0.0];
        let input = Input::sample(&sample);
        let states = batcher.encode(&input, &amplitude(1), &RequestOptions::default()).unwrap();
        assert_eq!(states.as_slice::<f64>().unwrap()[0].re.to_bits(), 1.0_f64.to_bits());
    }
    let stats = batcher.stats();
    assert_eq!((stats.requests, stats.started_idle, stats.batch_sizes[0]), (3, 3, 3));
    assert_eq!(stats.queue_wait_ns, 0);
}

#[test]
fn bad_requests_fail_alone() {
    let batcher = collecting();
    let batches = Arc::new(Batches::default());
    let options = RequestOptions::default();
    let submit = |token: u64, values: Vec<f64>, n: u32| {
        let mut input = Some(OwnedInput::rows(values, 2).unwrap());
        batcher.submit_to(&mut input, &amplitude(n), &options, listener(&batches), token)
    };
    let _good = submit(0, vec![3.0, 4.0], 1).unwrap();
    assert_eq!(
        submit(1, vec![1.0, 0.0, 0.0, f64::NAN], 1).unwrap_err(),
        Error::NonFinite { sample: 1, position: 1, nan: true }
    );
    assert_eq!(submit(2, vec![0.0, 0.0], 1).unwrap_err(), Error::ZeroNorm { sample: 0 });
    assert_eq!(submit(3, vec![1e200, 0.0], 1).unwrap_err(), Error::NormOverflow { sample: 0 });
    let _good = submit(4, vec![0.0, 2.0], 1).unwrap();
    batcher.close();
    let delivered = batches.0.lock();
    let [batch] = delivered.as_slice() else { panic!("not one batch") };
    let [(0, Ok(first)), (4, Ok(second))] = batch.as_slice() else { panic!("{batch:?}") };
    let real = |states: &StateBatch| -> Vec<f64> {
        states.as_slice::<f64>().unwrap().iter().map(|z| z.re).collect()
    };
    let alone = engine().encode(&Input::sample(&[3.0, 4.0]), &amplitude(1), None).unwrap();
    assert_eq!((real(first), real(second)), (real(&alone), vec![0.0, 1.0]));
    assert_eq!(batcher.stats().invalid, 3);
}

/// What is not about a request's data reaches all of its batch, and nobody else.
#[test]
fn a_failed_batch_fails_all_of_its_requests() {
    let config = BatcherConfig {
        max_delay: NEVER,
        max_batch_bytes: usize::MAX,
        max_batch_samples: 64,
        ..BatcherConfig::default()
    };
    let batcher = batcher(config);
    let large = EncodeSpec::new(Encoding::Phase, EncodeSpec::MAX_QUBITS).unwrap();
    let features = EncodeSpec::MAX_QUBITS as usize;
    let options = RequestOptions::default();
    let submit = |spec: &EncodeSpec, features: usize| {
        let input = OwnedInput::rows(vec![1.0; features], features).unwrap();
        batcher.submit(input, spec, &options).unwrap()
    };
    let failing = [submit(&large, features), submit(&large, features)];
    let fine = submit(&amplitude(1), 2);
    batcher.close();
    for request in failing {
        assert!(request.is_done());
        assert!(matches!(request.wait(), Err(Error::OutOfMemory { .. })));
    }
    assert_eq!(fine.wait().unwrap().batch(), 1);
}

#[test]
fn a_full_queue_refuses() {
    let config = BatcherConfig {
        max_delay: NEVER,
        queue: 2,
        when_full: WhenFull::Refuse,
        ..BatcherConfig::default()
    };
    let batcher = batcher(config);
    let options = RequestOptions::default();
    let submit = || batcher.submit(OwnedInput::sample(vec![1.0, 2.0]), &amplitude(1), &options);
    let waiting = [submit().unwrap(), submit().unwrap()];
    assert_eq!(submit().unwrap_err(), Error::QueueFull { queue: 2 });
    // One that leaves makes room.
    assert!(waiting[0].cancel() && !waiting[0].cancel());
    let third = submit().unwrap();
    batcher.close();
    assert_eq!(submit().unwrap_err(), Error::BatcherClosed { reason: "is closed" });
    let [first, second] = waiting.map(Request::wait);
    assert_eq!(first.unwrap_err(), Error::Cancelled);
    assert!(second.is_ok() && third.wait().is_ok());
    let stats = batcher.stats();
    assert_eq!((stats.refused, stats.cancelled, stats.requests), (1, 1, 2));
}

/// Parked requests keep their data, and come in turn, those of a higher level first.
#[test]
fn a_full_queue_makes_others_wait_in_order() {
    let config = BatcherConfig { max_delay: NEVER, queue: 2, ..BatcherConfig::default() };
    let batcher = batcher(config);
    let batches = Arc::new(Batches::default());
    let held: Vec<Arc<[f64]>> = (0..7).map(|i| Arc::from([f64::from(i), 1.0])).collect();
    for (token, values) in (0..).zip(&held) {
        let mut input = Some(OwnedInput::sample(Arc::clone(values)));
        let priority = i32::from(token == 4 || token == 6);
        let options = RequestOptions { priority, ..RequestOptions::default() };
        let spec = amplitude(1);
        let request = batcher.submit_to(&mut input, &spec, &options, listener(&batches), token);
        assert!(request.is_ok());
        assert_eq!(input.is_some(), token < 2);
    }
    assert_eq!(batcher.waiting(), 7);
    batcher.close();
    let tokens: Vec<Vec<u64>> = batches
        .0
        .lock()
        .iter()
        .map(|batch| batch.iter().map(|(token, _)| *token).collect())
        .collect();
    assert_eq!(tokens, [vec![0, 1], vec![4, 6], vec![2, 3], vec![5]]);
    assert!(held.iter().all(|values| Arc::strong_count(values) == 1), "data was kept");
}

/// Whoever leads leaves as others do, and another leads then.
#[test]
#[cfg_attr(miri, ignore = "looks at clocks")]
fn the_leaders_deadline_passes() {
    let batcher = Arc::new(collecting());
    let other = {
        let leading = Arc::clone(&batcher);
        let leader = std::thread::spawn(move || {
            let deadline = Some(Instant::now() + Duration::from_millis(50));
            let options = RequestOptions { deadline, ..RequestOptions::default() };
            leading.encode(&Input::sample(&[1.0]), &amplitude(1), &options)
        });
        while batcher.waiting() < 1 {
            std::thread::yield_now();
        }
        let follower = Arc::clone(&batcher);
        let other = std::thread::spawn(move || {
            follower.encode(&Input::sample(&[2.0]), &amplitude(1), &RequestOptions::default())
        });
        assert_eq!(leader.join().unwrap().unwrap_err(), Error::DeadlineExceeded);
        other
    };
    while batcher.waiting() < 1 {
        std::thread::yield_now();
    }
    batcher.close();
    assert_eq!(other.join().unwrap().unwrap().batch(), 1);
    assert_eq!(batcher.stats().expired, 1);
}

#[test]
#[cfg_attr(miri, ignore = "looks at clocks")]
fn deadlines_pass() {
    let batcher = collecting();
    let soon = || RequestOptions {
        deadline: Some(Instant::now() + Duration::from_millis(5)),
        ..RequestOptions::default()
    };
    // A caller leaves when it is time; a request is told when its batch starts.
    let queued = batcher.submit(OwnedInput::sample(vec![1.0]), &amplitude(1), &soon()).unwrap();
    let called = batcher.encode(&Input::sample(&[1.0]), &amplitude(1), &soon());
    assert_eq!(called.unwrap_err(), Error::DeadlineExceeded);
    let past = RequestOptions { deadline: Some(Instant::now()), ..RequestOptions::default() };
    let called = batcher.encode(&Input::sample(&[1.0]), &amplitude(1), &past);
    assert_eq!(called.unwrap_err(), Error::DeadlineExceeded);
    batcher.close();
    assert_eq!(queued.wait().unwrap_err(), Error::DeadlineExceeded);
    assert_eq!(batcher.stats().expired, 3);
}

/// Whoever waits, as a leader or behind one, is asked whether to go on.
#[test]
#[cfg_attr(miri, ignore = "looks at clocks")]
fn callers_are_called_away() {
    let config = BatcherConfig { max_delay: NEVER, queue: 2, ..BatcherConfig::default() };
    let batcher = Arc::new(batcher(config));
    let stop =
        RequestOptions { interrupt: Some(|| Err(Error::Interrupted)), ..RequestOptions::default() };
    let encode = |options: RequestOptions| {
        let batcher = Arc::clone(&batcher);
        move || batcher.encode(&Input::sample(&[1.0]), &amplitude(1), &options)
    };
    let wait_for = |waiting| {
        while batcher.waiting() != waiting {
            std::thread::yield_now();
        }
    };
    assert_eq!(encode(stop)().unwrap_err(), Error::Interrupted);
    let staying = std::thread::spawn(encode(RequestOptions::default()));
    wait_for(1);
    assert_eq!(encode(stop)().unwrap_err(), Error::Interrupted);
    let other = std::thread::spawn(encode(RequestOptions::default()));
    wait_for(2);
    assert_eq!((batcher.waiting(), batcher.stats().cancelled), (2, 2));
    batcher.close();
    for caller in [staying, other] {
        assert_eq!(caller.join().unwrap().unwrap().batch(), 1);
    }
}

#[test]
fn large_requests_go_straight_to_the_engine() {
    let batcher = batcher(BatcherConfig { max_batch_samples: 2, ..BatcherConfig::default() });
    let (values, options) = (values(0, 3, 2), RequestOptions::default());
    let states = batcher.encode(&Input::rows(&values, 2).unwrap(), &amplitude(1), &options);
    assert_eq!(states.unwrap().batch(), 3);
    let queued = batcher.submit(OwnedInput::rows(values, 2).unwrap(), &amplitude(1), &options);
    assert_eq!(queued.unwrap().wait().unwrap().batch(), 3);
    let stats = batcher.stats();
    assert_eq!((stats.direct, stats.requests), (2, 0));
}

/// A listener may close its batcher, on the batcher's own thread.
#[test]
fn a_listener_may_close() {
    struct Closing(Mutex<Option<Arc<Batcher>>>, Mutex<Sender<u64>>);
    impl Listener for Closing {
        fn deliver(&self, results: Results) {
            let batcher = self.0.lock().take();
            if let Some(batcher) = &batcher {
                batcher.close();
            }
            drop(batcher); // perhaps the last
            for (token, _) in results {
                let _ = self.1.lock().send(token);
            }
        }
    }
    let (sender, tokens) = channel();
    let batcher = Arc::new(batcher(BatcherConfig::default()));
    let closing = Arc::new(Closing(Mutex::new(Some(Arc::clone(&batcher))), Mutex::new(sender)));
    let mut input = Some(OwnedInput::sample(vec![1.0]));
    let (spec, options) = (amplitude(1), RequestOptions::default());
    let request = batcher.submit_to(&mut input, &spec, &options, closing, 7);
    drop(batcher);
    assert!(request.is_ok());
    assert_eq!(tokens.recv(), Ok(7));
}

/// A harmless row of every type is one that every encoding takes.
#[test]
fn rows_of_bad_requests_are_harmless() {
    use crate::element::{DType, Element};
    fn check<T: Element + Default>(values: &[T]) {
        let engine = engine();
        let mut specs = vec![amplitude(1)];
        if !T::DTYPE.is_complex() {
            specs.push(EncodeSpec::new(Encoding::Basis, 2).unwrap());
            specs.push(EncodeSpec::new(Encoding::Phase, 2).unwrap());
        }
        for spec in specs {
            let input = Input::sample(values);
            let plan = engine.plan(&input, &spec, None).unwrap();
            let rows = rows::Rows::new(&engine, 256, false).unwrap();
            // SAFETY: nobody else has the rows.
            unsafe {
                rows.fill(&plan, &(0..3));
                assert_eq!(engine.encode(&rows.input(&plan, 3), &spec, None).unwrap().batch(), 3);
            }
        }
        let _: DType = T::DTYPE;
    }
    check(&[1_u8; 2]);
    check(&[1_i64; 2]);
    check(&[half::f16::ONE; 2]);
    check(&[half::bf16::ONE; 2]);
    check(&[1.0_f32; 2]);
    check(&[1.0_f64; 2]);
    check(&[num_complex::Complex::new(1.0_f32, 0.0); 2]);
    check(&[num_complex::Complex::new(1.0_f64, 0.0); 2]);
}

/// Closes its batcher when it is told, and says so.
struct Closing(Weak<Batcher>, Sender<()>);

impl Listener for Closing {
    fn deliver(&self, _results: Results) {
        if let Some(batcher) = self.0.upgrade() {
            batcher.close();
        }
        let _ = self.1.send(());
    }
}

/// Whoever leads tells listeners, a caller that waits for its own batch, too.
#[test]
#[cfg_attr(miri, ignore = "looks at clocks")]
fn a_listener_may_close_on_a_callers_thread() {
    let config = BatcherConfig {
        max_delay: Duration::from_millis(200),
        max_batch_samples: 2,
        ..BatcherConfig::default()
    };
    let batcher = Arc::new(batcher(config));
    let (told, tells) = channel();
    let caller = {
        let batcher = Arc::clone(&batcher);
        std::thread::spawn(move || {
            batcher.encode(&Input::sample(&[1.0, 2.0]), &amplitude(1), &RequestOptions::default())
        })
    };
    while batcher.waiting() == 0 {
        std::thread::yield_now();
    }
    let listener: Arc<dyn Listener> = Arc::new(Closing(Arc::downgrade(&batcher), told));
    let mut pair = Some(OwnedInput::rows(vec![1.0; 8], 4).unwrap());
    let options = RequestOptions::default();
    let _request = batcher.submit_to(&mut pair, &amplitude(2), &options, listener, 0).unwrap();
    tells.recv_timeout(NEVER).expect("closing in a listener came back");
    assert_eq!(caller.join().unwrap().unwrap().batch(), 1);
}

/// Asks its batcher something when it is dropped, and says so.
struct Asking(Weak<Batcher>, Sender<usize>);

impl Drop for Asking {
    fn drop(&mut self) {
        if let Some(batcher) = self.0.upgrade() {
            let _ = self.1.send(batcher.waiting());
        }
    }
}

/// A destructor may be anybody's code.
#[test]
#[cfg_attr(miri, ignore = "looks at clocks")]
fn data_is_let_go_behind_the_lock() {
    let config = BatcherConfig {
        max_delay: Duration::from_millis(200),
        queue: 1,
        ..BatcherConfig::default()
    };
    let batcher = Arc::new(batcher(config));
    let (asked, asks) = channel();
    let options = RequestOptions::default();
    let first = OwnedInput::rows(vec![1.0; 2], 2).unwrap();
    let first = batcher.submit(first, &amplitude(1), &options).unwrap();
    let owner = Box::new(Asking(Arc::downgrade(&batcher), asked));
    // SAFETY: the values are static.
    let parked = unsafe { OwnedInput::from_raw(Input::sample(&[1.0, 2.0]), owner) };
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let late = RequestOptions { deadline, ..options };
    let parked = batcher.submit(parked, &amplitude(1), &late).unwrap();
    assert!(first.wait().is_ok());
    assert_eq!(parked.wait().unwrap_err(), Error::DeadlineExceeded);
    asks.recv_timeout(NEVER).expect("the destructor came back");
}
