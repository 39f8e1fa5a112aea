//! The whole pipeline with simulated lanes: any sizes, any order in which the device gets things
//! done, failures and panics at any step.

use super::config::PipelineConfig;
use super::drive::drive;
use super::plan::{Chunk, Cut, Piece, Samples};
use super::ring::{Lane, Ring};
use super::stats::Counters;
use crate::error::{Error, Result};
use parking_lot::Mutex;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The k-th call of the lane answers with an error.
    Error(usize),
    /// It panics.
    Panic(usize),
}

/// What is enqueued on the simulated device.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    /// Waits for so many kernels of its slot.
    Copy { slot: usize, behind: usize },
    /// Waits for so many copies of its slot.
    Compute { slot: usize, behind: usize, chunk: usize, run: usize },
}

/// The run, the chunk and the pieces that were staged for it.
type Staged = (usize, usize, Vec<usize>);

#[derive(Default)]
struct Device {
    /// Not done yet, each queue in order.
    copies: VecDeque<Op>,
    kernels: VecDeque<Op>,
    /// By slot, in host memory, and as it was copied.
    staged: Vec<Staged>,
    arrived: Vec<Staged>,
    /// By slot, how many copies were enqueued, and how many are done.
    copied: Vec<(usize, usize)>,
    computed: Vec<(usize, usize)>,
    /// What the last run encoded, in order, and what it found to encode.
    encoded: Vec<(usize, Staged)>,
    run: usize,
    calls: usize,
    /// Decides how far the device gets at each call.
    turns: Vec<u8>,
}

/// A lane whose device runs only when it is asked, as far as chance has it.
struct Simulated<'a> {
    state: Mutex<Device>,
    cut: &'a Cut,
    fault: Mutex<Fault>,
    /// Pieces that threads are staging now, by slot.
    staging: Vec<Mutex<usize>>,
    bad_piece: Option<usize>,
}

impl<'a> Simulated<'a> {
    fn new(
        slots: usize,
        cut: &'a Cut,
        turns: Vec<u8>,
        fault: Fault,
        bad_piece: Option<usize>,
    ) -> Self {
        let state = Device {
            staged: vec![Default::default(); slots],
            arrived: vec![Default::default(); slots],
            copied: vec![(0, 0); slots],
            computed: vec![(0, 0); slots],
            turns,
            ..Device::default()
        };
        let staging = (0..slots).map(|_| Mutex::new(0)).collect();
        Self { state: Mutex::new(state), cut, fault: Mutex::new(fault), staging, bad_piece }
    }

    /// One call: lets the device get on, and fails where this is the call that is to.
    fn call(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.calls += 1;
        let call = state.calls;
        let steps = state.turns.get(call % state.turns.len().max(1)).copied().unwrap_or(0);
        for _ in 0..steps {
            state.step();
        }
        drop(state);
        match *self.fault.lock() {
            Fault::Error(k) if k == call => Err(fault()),
            Fault::Panic(k) if k == call => panic!("simulated"),
            _ => Ok(()),
        }
    }
}

fn fault() -> Error {
    Error::Driver { call: "simulated", name: "FAULT".to_owned(), description: String::new() }
}

impl Device {
    /// The device does one thing, if there is one that need not wait.
    fn step(&mut self) -> bool {
        if let Some(&Op::Compute { slot, behind, chunk, run }) = self.kernels.front()
            && self.copied[slot].1 >= behind
        {
            self.kernels.pop_front();
            if run == self.run {
                self.encoded.push((chunk, self.arrived[slot].clone()));
            }
            self.computed[slot].1 += 1;
            return true;
        }
        if let Some(&Op::Copy { slot, behind }) = self.copies.front()
            && self.computed[slot].1 >= behind
        {
            self.copies.pop_front();
            self.arrived[slot] = self.staged[slot].clone();
            self.copied[slot].1 += 1;
            return true;
        }
        false
    }
}

impl Lane for Simulated<'_> {
    fn stage(&self, slot: usize, piece: &Piece) -> Result<f64> {
        *self.staging[slot].lock() += 1;
        let index = self.cut.pieces.iter().position(|other| other == piece).unwrap();
        {
            let mut state = self.state.lock();
            let (enqueued, done) = state.copied[slot];
            assert_eq!(enqueued, done, "staged into a slot whose copy is in flight");
            let run = state.run;
            if state.staged[slot].0 != run || state.staged[slot].1 != piece.chunk {
                state.staged[slot] = (run, piece.chunk, Vec::new());
            }
            state.staged[slot].2.push(index);
        }
        std::thread::yield_now();
        *self.staging[slot].lock() -= 1;
        if self.bad_piece.is_some_and(|bad| index >= bad) {
            return Err(Error::ZeroNorm { sample: index });
        }
        Ok(index as f64)
    }

    fn copy(&self, slot: usize, chunk: &Chunk) -> Result<()> {
        self.call()?;
        assert_eq!(*self.staging[slot].lock(), 0, "copied while somebody stages");
        let mut state = self.state.lock();
        if chunk.pieces.is_empty() {
            // Copied from where it lies.
            let index = self.cut.chunks.iter().position(|other| other == chunk).unwrap();
            state.staged[slot] = (state.run, index, Vec::new());
        }
        let behind = state.computed[slot].0;
        state.copies.push_back(Op::Copy { slot, behind });
        state.copied[slot].0 += 1;
        Ok(())
    }

    fn compute(&self, slot: usize, chunk: &Chunk) -> Result<()> {
        self.call()?;
        let chunk = self.cut.chunks.iter().position(|other| other == chunk).unwrap();
        let mut state = self.state.lock();
        let (behind, run) = (state.copied[slot].0, state.run);
        state.kernels.push_back(Op::Compute { slot, behind, chunk, run });
        state.computed[slot].0 += 1;
        Ok(())
    }

    fn is_copied(&self, slot: usize) -> Result<bool> {
        self.call()?;
        let state = self.state.lock();
        Ok(state.copied[slot].0 == state.copied[slot].1)
    }

    fn wait_copied(&self, slot: usize) -> Result<()> {
        self.call()?;
        let mut state = self.state.lock();
        while state.copied[slot].0 > state.copied[slot].1 {
            assert!(state.step(), "the host waits for what never happens");
        }
        Ok(())
    }

    fn drain(&self) -> Result<()> {
        self.call()?;
        let mut state = self.state.lock();
        while state.step() {}
        assert!(state.copies.is_empty() && state.kernels.is_empty());
        Ok(())
    }
}

fn run(ring: &mut Ring, lane: &Simulated<'_>, threads: usize) -> Result<Vec<f64>> {
    {
        let mut state = lane.state.lock();
        state.run += 1;
        state.encoded.clear();
    }
    let (end, sums) = drive(ring, lane, lane.cut, 0, threads, &Counters::default(), &mut || false)?;
    assert_eq!(end, lane.cut.chunks.len());
    Ok(sums)
}

/// Every chunk was encoded once, in order, from all of its pieces.
fn assert_encoded(lane: &Simulated<'_>) {
    let mut state = lane.state.lock();
    while state.step() {}
    assert!(state.copies.is_empty() && state.kernels.is_empty());
    let chunks: Vec<usize> = state.encoded.iter().map(|(chunk, _)| *chunk).collect();
    assert_eq!(chunks, (0..lane.cut.chunks.len()).collect::<Vec<_>>());
    let run = state.run;
    for (chunk, found) in &mut state.encoded {
        found.2.sort_unstable();
        let pieces = lane.cut.chunks[*chunk].pieces.clone().collect();
        assert_eq!(*found, (run, *chunk, pieces));
    }
}

prop_compose! {
    fn cuts()(
        batch in 1usize..60,
        features in prop_oneof![1usize..50, 5_000usize..70_000],
        staged in prop::bool::weighted(0.8),
        direct_bytes in prop_oneof![Just(0usize), Just(64usize << 10)],
    ) -> Cut {
        let config = PipelineConfig {
            min_chunk_bytes: 64 << 10,
            max_chunk_bytes: 256 << 10,
            direct_bytes,
            ..PipelineConfig::built_in(4)
        };
        let batch = batch.min(1_000_000 / features).max(1);
        Cut::new(0..batch, Samples { features, size: 8, staged, growing: staged }, &config)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 64 }))]

    #[test]
    fn every_chunk_is_encoded_once_from_all_its_pieces(
        cut in cuts(),
        slots in 2usize..6,
        threads in 1usize..4,
        turns in prop::collection::vec(0u8..4, 1..20),
    ) {
        let mut ring = Ring::new(slots);
        let lane = Simulated::new(slots, &cut, turns, Fault::None, None);
        for _ in 0..3 {
            let sums = run(&mut ring, &lane, threads).unwrap();
            let expected: Vec<f64> = (0..cut.pieces.len()).map(|i| i as f64).collect();
            prop_assert_eq!(sums, expected);
        }
        assert_encoded(&lane);
    }

    #[test]
    fn any_failure_drains_and_the_ring_goes_on(
        cut in cuts(),
        slots in 2usize..6,
        threads in 1usize..4,
        turns in prop::collection::vec(0u8..4, 1..20),
        k in 1usize..40,
        panics: bool,
    ) {
        let fault = if panics { Fault::Panic(k) } else { Fault::Error(k) };
        let lane = Simulated::new(slots, &cut, turns, fault, None);
        let mut ring = Ring::new(slots);
        let result = catch_unwind(AssertUnwindSafe(|| run(&mut ring, &lane, threads)));
        *lane.fault.lock() = Fault::None;
        match result {
            Ok(Ok(_)) => prop_assert!(lane.state.lock().calls < k, "the fault was swallowed"),
            Ok(Err(error)) => prop_assert_eq!(error, self::fault()),
            Err(_) => prop_assert!(panics),
        }
        // Whatever happened, the next call on the same ring and device works.
        prop_assert!(run(&mut ring, &lane, threads).is_ok());
        assert_encoded(&lane);
    }

    #[test]
    fn the_first_bad_piece_is_the_error(
        cut in cuts(),
        slots in 2usize..6,
        threads in 1usize..4,
        bad in 0usize..100,
    ) {
        prop_assume!(!cut.pieces.is_empty());
        let bad = bad % cut.pieces.len();
        let lane = Simulated::new(slots, &cut, vec![1], Fault::None, Some(bad));
        let mut ring = Ring::new(slots);
        prop_assert_eq!(run(&mut ring, &lane, threads), Err(Error::ZeroNorm { sample: bad }));
        let fine = Simulated { bad_piece: None, ..lane };
        prop_assert!(run(&mut ring, &fine, threads).is_ok());
        assert_encoded(&fine);
    }

    #[test]
    fn a_run_goes_on_after_a_pause(
        cut in cuts(),
        slots in 2usize..6,
        threads in 1usize..4,
        turns in prop::collection::vec(0u8..4, 1..20),
        pauses in prop::collection::vec(any::<bool>(), 1..10),
    ) {
        let lane = Simulated::new(slots, &cut, turns, Fault::None, None);
        let mut ring = Ring::new(slots);
        lane.state.lock().run += 1;
        let mut pauses = pauses.iter().cycle();
        let (mut next, mut sums) = (0, Vec::new());
        while next < cut.chunks.len() {
            let mut pause = || *pauses.next().unwrap();
            let counters = Counters::default();
            let (end, of_pieces) =
                drive(&mut ring, &lane, &cut, next, threads, &counters, &mut pause).unwrap();
            prop_assert!(end > next, "a pause comes behind a chunk");
            next = end;
            sums.extend(of_pieces);
        }
        prop_assert_eq!(sums, (0..cut.pieces.len()).map(|i| i as f64).collect::<Vec<_>>());
        assert_encoded(&lane);
    }
}
