use super::{CoalesceOptions, Coalescer, FlushReason};
use crate::encoding::{EncodeSpec, Encoding};
use crate::engine::{Device, Engine};
use crate::error::Error;
use crate::input::Input;
use proptest::prelude::*;
use std::sync::Arc;

const FEATURES: usize = 8;

/// What a caller does.
#[derive(Debug, Clone)]
enum Step {
    /// Samples, the bad ones with a NaN: none, one or more of so many values.
    Submit {
        samples: usize,
        features: usize,
        bad: Option<usize>,
        narrow: bool,
    },
    /// A request of more values than the encoding takes.
    TooLong,
    Flush,
    /// The result of an earlier request.
    Result(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let submit =
        (0usize..4, 1..=FEATURES, prop::option::weighted(0.2, any::<prop::sample::Index>()))
            .prop_flat_map(|(samples, features, bad)| {
                any::<bool>().prop_map(move |narrow| Step::Submit {
                    samples,
                    features,
                    bad: bad.filter(|_| samples > 0).map(|bad| bad.index(samples)),
                    narrow,
                })
            });
    let step = prop_oneof![
        12 => submit,
        1 => Just(Step::TooLong),
        1 => Just(Step::Flush),
        1 => any::<prop::sample::Index>().prop_map(Step::Result),
    ];
    prop::collection::vec(step, 0..40)
}

/// A request's memory.
enum Values {
    Wide(Vec<f64>),
    Narrow(Vec<f32>),
}

impl Values {
    fn input(&self, samples: usize, features: usize) -> Input<'_> {
        let input = match self {
            Self::Wide(values) => Input::rows(values, features),
            Self::Narrow(values) => Input::rows(values, features),
        };
        let input = input.unwrap();
        assert_eq!(input.batch(), samples);
        input
    }
}

proptest! {
    /// Whatever is submitted, wherever it is flushed: every request has the states, or the error,
    /// that it would have alone, in order, and its memory is let go once.
    #[test]
    fn every_request_is_as_if_alone(
        steps in steps(),
        max_samples in prop_oneof![Just(usize::MAX), 1usize..8],
        max_bytes in prop_oneof![Just(usize::MAX), 1usize..1000],
    ) {
        let engine = Engine::open(Device::Cpu).unwrap();
        let spec = EncodeSpec::new(Encoding::Amplitude, 3).unwrap();
        let precision = Some(crate::Precision::Complex128);
        let mut options = CoalesceOptions { max_samples, max_bytes, ..CoalesceOptions::default() };
        options.encode.precision = precision;
        let mut coalescer = Coalescer::new(engine.clone(), spec.clone(), options).unwrap();
        let mut requests: Vec<(Arc<Values>, usize, usize)> = Vec::new();
        let mut value = 0.0;
        for step in steps {
            match step {
                Step::Flush => coalescer.flush().unwrap(),
                Step::Result(index) if !requests.is_empty() => {
                    let _ = coalescer.result(index.index(requests.len()));
                    prop_assert!(coalescer.is_done(index.index(requests.len())));
                }
                Step::Result(_) => {}
                Step::Submit { .. } | Step::TooLong => {
                    let (samples, features, bad, narrow) = match step {
                        Step::Submit { samples, features, bad, narrow } => (samples, features, bad, narrow),
                        _ => (1, FEATURES + 1, None, false),
                    };
                    let mut values: Vec<f64> = (0..samples * features).map(|_| { value += 1.0; value }).collect();
                    if let Some(bad) = bad {
                        values[bad * features + features / 2] = f64::NAN;
                    }
                    let values = Arc::new(if narrow {
                        Values::Narrow(values.iter().map(|&x| x as f32).collect())
                    } else {
                        Values::Wide(values)
                    });
                    requests.push((Arc::clone(&values), samples, features));
                    let keep = Arc::clone(&values);
                    let input = values.input(samples, features);
                    if coalescer.passes_through(&input) {
                        coalescer.pass_through(&input, &options.encode).unwrap();
                    } else {
                        // SAFETY: the Arc keeps the values where they are.
                        let due = unsafe { coalescer.submit(&input, keep) };
                        if let Some(reason) = due {
                            coalescer.flush_for(reason).unwrap();
                        }
                    }
                }
            }
            prop_assert_eq!(coalescer.len(), requests.len());
        }
        coalescer.flush().unwrap();
        prop_assert_eq!(coalescer.num_queued(), 0);
        drop(coalescer.take_spent());
        let mut whole = Vec::new();
        let mut first_error = None;
        for (request, (values, samples, features)) in requests.iter().enumerate() {
            prop_assert_eq!(Arc::strong_count(values), 1, "memory is let go");
            let alone = engine.encode(&values.input(*samples, *features), &spec, precision);
            match (coalescer.result(request), alone) {
                (Ok(states), Ok(alone)) => {
                    prop_assert_eq!(states.as_slice::<f64>().unwrap(), alone.as_slice::<f64>().unwrap());
                    whole.extend_from_slice(alone.as_slice::<f64>().unwrap());
                }
                (Err(error), Err(alone)) => {
                    prop_assert_eq!(&error, &alone);
                    first_error.get_or_insert(request);
                }
                (got, alone) => prop_assert!(false, "{got:?} instead of {alone:?}"),
            }
        }
        prop_assert_eq!(coalescer.first_failure().map(|(request, _)| request), first_error);
        match coalescer.states() {
            Ok(states) => prop_assert_eq!(states.as_slice::<f64>().unwrap(), &whole[..]),
            Err(_) => prop_assert!(first_error.is_some()),
        }
        let stats = coalescer.stats();
        prop_assert_eq!(stats.requests as usize, requests.len());
        let flushes: u64 = stats.flushes.iter().sum();
        prop_assert_eq!(flushes, stats.flushed_samples.iter().sum::<u64>());
    }
}

#[test]
fn thresholds_say_when() {
    let engine = Engine::open(Device::Cpu).unwrap();
    let spec = EncodeSpec::new(Encoding::Amplitude, 1).unwrap();
    let options = CoalesceOptions { max_samples: 3, max_bytes: 40, ..CoalesceOptions::default() };
    let mut coalescer = Coalescer::new(engine, spec, options).unwrap();
    let values = [1.0; 20];
    let mut submit = |samples: usize| {
        let input = Input::rows(&values[..2 * samples], 2).unwrap();
        assert_eq!(coalescer.passes_through(&input), samples > 2);
        // SAFETY: the values outlive the coalescer.
        let due = unsafe { coalescer.submit(&input, ()) };
        due.inspect(|&reason| coalescer.flush_for(reason).unwrap())
    };
    assert_eq!(submit(1), None);
    assert_eq!(submit(2), Some(FlushReason::Samples));
    assert_eq!(submit(2), None);
    assert_eq!(submit(0), None);
    assert_eq!(submit(1), Some(FlushReason::Samples));
    let too_much = CoalesceOptions { max_samples: 0, ..options };
    let engine = Engine::open(Device::Cpu).unwrap();
    let spec = EncodeSpec::new(Encoding::Amplitude, 1).unwrap();
    assert!(Coalescer::<()>::new(engine, spec, too_much).is_err());
}

#[test]
fn cancelled_requests_are_not_encoded() {
    let engine = Engine::open(Device::Cpu).unwrap();
    let spec = EncodeSpec::new(Encoding::Amplitude, 1).unwrap();
    let mut coalescer = Coalescer::new(engine, spec, CoalesceOptions::default()).unwrap();
    let values = Arc::new([3.0, 4.0]);
    // SAFETY: the Arc keeps the values where they are.
    let due = unsafe { coalescer.submit(&Input::sample(&*values), Arc::clone(&values)) };
    assert_eq!(due, None);
    coalescer.fail(Error::ZeroNorm { sample: 0 });
    coalescer.cancel();
    assert_eq!(coalescer.result(0).unwrap_err(), Error::Cancelled);
    assert_eq!(coalescer.result(1).unwrap_err(), Error::ZeroNorm { sample: 0 });
    assert!(coalescer.is_cancelled(0) && !coalescer.is_cancelled(1));
    assert_eq!((coalescer.stats().cancelled, coalescer.stats().flushes), (1, [0; 4]));
    drop(coalescer.take_spent());
    assert_eq!(Arc::strong_count(&values), 1);
}

#[test]
fn a_handle_is_of_its_own_scope() {
    let engine = Engine::open(Device::Cpu).unwrap();
    let spec = EncodeSpec::new(Encoding::Amplitude, 1).unwrap();
    let sample = [3.0, 4.0];
    let run = || {
        engine
            .run_coalesced(&spec, CoalesceOptions::default(), |batch| batch.submit(&sample))
            .unwrap()
    };
    let ((one, mut first), (other, mut second)) = (run(), run());
    assert!(first.result(one).is_ok() && second.result(other).is_ok());
    let refused = first.result(other).unwrap_err();
    assert!(matches!(refused, Error::InvalidArgument { argument: "handle", .. }));
}
