//! A batcher under everything at once: callers, asynchronous requests, bad data, deadlines,
//! cancellations, full queues and closing. Every request ends exactly once, as it should, and
//! nothing is kept.
//!
//! `QDP_STRESS_SECONDS` says for how long; two by default.

use qdp_core::coalesce::batcher::{Listener, Request, RequestOptions};
use qdp_core::{
    Batcher, BatcherConfig, Device, EncodeSpec, Encoding, Engine, Error, Input, OwnedInput, Result,
    StateBatch, WhenFull,
};
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

const THREADS: u64 = 8;

/// Callers that were called away and have not said so.
static INTERRUPTED: AtomicI64 = AtomicI64::new(0);

/// Calls every third away that is asked.
fn interrupt() -> Result<()> {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    if !ASKED.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
        return Ok(());
    }
    INTERRUPTED.fetch_add(1, Ordering::Relaxed);
    Err(Error::Interrupted)
}

/// `xorshift64*`: no two threads have the same.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below
    }
}

/// What a request is about.
#[derive(Clone)]
struct Sample {
    values: Arc<[f64]>,
    spec: EncodeSpec,
    bad: bool,
}

impl Sample {
    fn random(random: &mut Random) -> Self {
        let n = 1 + random.next(4) as u32;
        let amplitude = random.next(3) > 0;
        let (encoding, features) =
            if amplitude { (Encoding::Amplitude, 1 << n) } else { (Encoding::Phase, n as usize) };
        let rows = if random.next(8) == 0 { 1 + random.next(5) as usize } else { 1 };
        let mut values: Vec<f64> =
            (0..rows * features).map(|_| 1.0 + random.next(1000) as f64).collect();
        let bad = random.next(10) == 0;
        if bad {
            values[random.next((rows * features) as u64) as usize] = f64::NAN;
        }
        let spec = EncodeSpec::new(encoding, n).unwrap();
        Self { values: values.into(), spec, bad }
    }

    fn features(&self) -> usize {
        self.spec.num_features()
    }

    /// Whether a result is what the engine alone gives.
    fn check(&self, engine: &Engine, result: Result<StateBatch>, may_expire: bool) {
        match result {
            Ok(states) => {
                assert!(!self.bad, "a bad sample was encoded");
                let input = Input::rows(&self.values, self.features()).unwrap();
                let alone = engine.encode(&input, &self.spec, None).unwrap();
                assert_eq!(states.batch(), input.batch());
                assert_eq!(states.as_slice::<f64>(), alone.as_slice::<f64>());
            }
            Err(Error::NonFinite { sample, position, nan: true }) => {
                assert!(self.values[sample * self.features() + position].is_nan());
            }
            Err(Error::DeadlineExceeded) => assert!(may_expire),
            Err(Error::Interrupted) => {
                INTERRUPTED.fetch_sub(1, Ordering::Relaxed);
            }
            Err(Error::QueueFull { .. } | Error::BatcherClosed { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
}

/// Requests that are under way, each to be delivered once.
struct Delivered {
    engine: Engine,
    waiting: Mutex<HashMap<u64, (Sample, bool)>>,
    count: AtomicU64,
}

impl Listener for Delivered {
    fn deliver(&self, results: Vec<(u64, Result<StateBatch>)>) {
        for (token, result) in results {
            let (sample, may_expire) =
                self.waiting.lock().unwrap().remove(&token).expect("it was delivered before");
            sample.check(&self.engine, result, may_expire);
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn config(random: &mut Random) -> BatcherConfig {
    BatcherConfig {
        // The last is long enough for callers to be asked whether they go on.
        max_delay: Duration::from_micros([0, 0, 0, 50, 50, 60_000][random.next(6) as usize]),
        max_batch_samples: [usize::MAX, 4][random.next(2) as usize],
        queue: [1024, 3][random.next(2) as usize],
        when_full: [WhenFull::Wait, WhenFull::Refuse][random.next(2) as usize],
        ..BatcherConfig::default()
    }
}

fn options(random: &mut Random) -> (RequestOptions, bool) {
    let may_expire = random.next(6) == 0;
    let deadline = may_expire.then(|| Instant::now() + Duration::from_micros(random.next(200)));
    let priority = random.next(3) as i32;
    let interrupt = (random.next(2) == 0).then_some(interrupt as fn() -> Result<()>);
    (RequestOptions { deadline, priority, interrupt, ..RequestOptions::default() }, may_expire)
}

#[test]
fn stress_batcher() {
    #[allow(clippy::disallowed_methods, reason = "how long a test runs is no configuration")]
    let seconds = std::env::var("QDP_STRESS_SECONDS").ok().and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(2));
    let engine = Engine::open(Device::Cpu).unwrap();
    let new = |random: &mut Random| Arc::new(Batcher::new(&engine, config(random)).unwrap());
    let shared = RwLock::new(new(&mut Random(1)));
    let delivered = Arc::new(Delivered {
        engine: engine.clone(),
        waiting: Mutex::default(),
        count: AtomicU64::new(0),
    });
    let (tokens, encoded) = (AtomicU64::new(0), AtomicU64::new(0));
    let samples = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (engine, shared, delivered) = (&engine, &shared, &delivered);
            let (tokens, encoded, samples, new) = (&tokens, &encoded, &samples, &new);
            scope.spawn(move || {
                let mut random = Random(0x9e37_79b9 + thread);
                let mut own: Vec<(Request, Sample, bool)> = Vec::new();
                while Instant::now() < end {
                    let batcher = Arc::clone(&shared.read().unwrap());
                    let sample = Sample::random(&mut random);
                    let (options, may_expire) = options(&mut random);
                    let values =
                        || OwnedInput::rows(Arc::clone(&sample.values), sample.features()).unwrap();
                    match random.next(100) {
                        0..50 => {
                            let input = Input::rows(&sample.values, sample.features()).unwrap();
                            let result = batcher.encode(&input, &sample.spec, &options);
                            encoded.fetch_add(u64::from(result.is_ok()), Ordering::Relaxed);
                            sample.check(engine, result, may_expire);
                        }
                        50..80 => {
                            let token = tokens.fetch_add(1, Ordering::Relaxed);
                            let entry = (sample.clone(), may_expire);
                            delivered.waiting.lock().unwrap().insert(token, entry);
                            let told = Arc::clone(delivered) as Arc<dyn Listener>;
                            let mut input = Some(values());
                            let request =
                                batcher.submit_to(&mut input, &sample.spec, &options, told, token);
                            let gone = match request {
                                Ok(request) => random.next(3) == 0 && request.cancel(),
                                Err(error) => {
                                    sample.check(engine, Err(error), may_expire);
                                    true
                                }
                            };
                            if gone {
                                let left = delivered.waiting.lock().unwrap().remove(&token);
                                assert!(left.is_some(), "it was delivered nonetheless");
                            }
                        }
                        80..99 => match batcher.submit(values(), &sample.spec, &options) {
                            Ok(request) => own.push((request, sample.clone(), may_expire)),
                            Err(error) => sample.check(engine, Err(error), may_expire),
                        },
                        _ => {
                            let next = new(&mut random);
                            let before = std::mem::replace(&mut *shared.write().unwrap(), next);
                            before.close();
                            assert_eq!(before.waiting(), 0);
                        }
                    }
                    if own.len() > 20 {
                        for (request, sample, may_expire) in own.drain(..) {
                            if request.cancel() {
                                assert_eq!(request.wait().unwrap_err(), Error::Cancelled);
                            } else {
                                sample.check(engine, request.wait(), may_expire);
                            }
                        }
                    }
                    let mut samples = samples.lock().unwrap();
                    if samples.len() < 10_000 {
                        samples.push(sample.values);
                    }
                }
                for (request, sample, may_expire) in own {
                    sample.check(engine, request.wait(), may_expire);
                }
            });
        }
    });
    let last = shared.into_inner().unwrap();
    last.close();
    assert_eq!(last.waiting(), 0);
    drop(last);
    assert!(delivered.waiting.lock().unwrap().is_empty(), "some were not delivered");
    assert_eq!(INTERRUPTED.load(Ordering::Relaxed), 0, "one was called away and not told");
    assert!(encoded.into_inner() > 0 && delivered.count.load(Ordering::Relaxed) > 0);
    // The engine's dispatch thread lets go of its last job's data a moment later.
    engine.dispatch(|| Ok(())).wait().unwrap();
    let kept = samples.into_inner().unwrap();
    assert!(kept.iter().all(|values| Arc::strong_count(values) == 1), "data was kept");
}
