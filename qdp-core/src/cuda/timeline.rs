//! When copies and kernels ran, measured by the device, where somebody asks for it.

use super::{Context, Event, RawStream};
use crate::error::Result;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

/// Spans kept until somebody asks; older ones are added up.
const MAX_SPANS: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Copy,
    Compute,
}

/// How long copies ran, kernels, and both at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Busy {
    pub(super) copy: Duration,
    pub(super) compute: Duration,
    pub(super) overlap: Duration,
}

/// Notes copies and kernels of one device.
pub(super) struct Timeline {
    context: Arc<Context>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    spans: Vec<(Kind, Event, Event)>,
    total: Busy,
}

impl Timeline {
    pub(super) fn new(context: &Arc<Context>) -> Self {
        Self { context: Arc::clone(context), state: Mutex::default() }
    }

    /// What runs on `stream` from here on is to be noted.
    pub(super) fn begin(&self, stream: RawStream) -> Result<Event> {
        let event = Event::timed(&self.context)?;
        event.record(stream)?;
        Ok(event)
    }

    pub(super) fn end_copy(&self, began: Event, stream: RawStream) -> Result<()> {
        self.end(Kind::Copy, began, stream)
    }

    pub(super) fn end_compute(&self, began: Event, stream: RawStream) -> Result<()> {
        self.end(Kind::Compute, began, stream)
    }

    fn end(&self, kind: Kind, began: Event, stream: RawStream) -> Result<()> {
        let ended = self.begin(stream)?;
        let mut state = self.state.lock();
        state.spans.push((kind, began, ended));
        if state.spans.len() >= MAX_SPANS {
            Self::add_up(&mut state)?;
        }
        Ok(())
    }

    /// What was noted so far; waits for what is in flight.
    pub(super) fn busy(&self) -> Result<Busy> {
        let mut state = self.state.lock();
        Self::add_up(&mut state)?;
        Ok(state.total)
    }

    fn add_up(state: &mut State) -> Result<()> {
        let (mut copies, mut kernels) = (Vec::new(), Vec::new());
        let spans = std::mem::take(&mut state.spans);
        // Times are measured from the first of them: the driver counts in floats, which would have
        // no microseconds left some minutes after any fixed one.
        let Some((_, origin, _)) = spans.first() else { return Ok(()) };
        for (_, _, ended) in &spans {
            ended.synchronize()?;
        }
        for (kind, began, ended) in &spans {
            let span = (began.elapsed(origin)?, ended.elapsed(origin)?);
            match kind {
                Kind::Copy => copies.push(span),
                Kind::Compute => kernels.push(span),
            }
        }
        let (copies, kernels) = (union(copies), union(kernels));
        state.total.copy += length(&copies);
        state.total.compute += length(&kernels);
        state.total.overlap += overlap(&copies, &kernels);
        Ok(())
    }
}

type Span = (Duration, Duration);

/// The time covered, as spans apart from each other, in order.
fn union(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable();
    let mut apart: Vec<Span> = Vec::new();
    for (start, end) in spans {
        match apart.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => apart.push((start, end)),
        }
    }
    apart
}

fn length(spans: &[Span]) -> Duration {
    spans.iter().map(|(start, end)| end.saturating_sub(*start)).sum()
}

fn overlap(a: &[Span], b: &[Span]) -> Duration {
    let (mut i, mut j, mut total) = (0, 0, Duration::ZERO);
    while i < a.len() && j < b.len() {
        total += a[i].1.min(b[j].1).saturating_sub(a[i].0.max(b[j].0));
        if a[i].1 < b[j].1 { i += 1 } else { j += 1 }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(list: &[(u64, u64)]) -> Vec<Span> {
        let micros = Duration::from_micros;
        list.iter().map(|&(start, end)| (micros(start), micros(end))).collect()
    }

    #[test]
    fn time_is_counted_once() {
        let copies = union(spans(&[(10, 20), (0, 5), (18, 30), (40, 41)]));
        assert_eq!(copies, spans(&[(0, 5), (10, 30), (40, 41)]));
        assert_eq!(length(&copies), Duration::from_micros(26));
        let kernels = spans(&[(4, 12), (25, 45)]);
        assert_eq!(overlap(&copies, &kernels), Duration::from_micros(1 + 2 + 5 + 1));
        assert_eq!(overlap(&kernels, &copies), overlap(&copies, &kernels));
        assert_eq!(overlap(&copies, &[]), Duration::ZERO);
    }
}
