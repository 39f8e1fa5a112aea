//! What the memory of a replay holds: the other inputs, each at a place of its own, then the samples
//! of the largest batch, so that any batch and its inputs are the beginning of one block.

use crate::coalesce::batcher::fill;
use crate::cpu::parallel::STAGE;
use crate::element::DType;
use crate::encoding::Form;
use crate::encoding::product::{Factor, Product};
use crate::error::{Error, Result};
use crate::input::Input;
use crate::pipeline::plan::Piece;
use crate::pipeline::stage::{Staging, copy_rows};
use crate::plan::EncodePlan;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;

/// Where inputs begin: at multiples of what device memory is allocated in.
const ALIGN: usize = 256;
/// Samples of more bytes are written past the caches, and by several threads.
const SMALL_BYTES: usize = 256 << 10;
/// What each of those takes at a time: small, so that many have a part where there is not much.
const GROUP_BYTES: usize = 64 << 10;

/// An input beside the samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSpec {
    /// Its name.
    pub name: String,
    /// One or two dimensions; the first may be `None`: as many as there are samples.
    pub shape: Vec<Option<usize>>,
    /// Its element type.
    pub dtype: DType,
}

impl InputSpec {
    /// The shape for a batch.
    pub(super) fn shape_for(&self, batch: usize) -> Vec<usize> {
        self.shape.iter().map(|size| size.unwrap_or(batch)).collect()
    }

    /// Rows and columns for a batch; one dimension is one row.
    fn extent(&self, batch: usize) -> (usize, usize) {
        match *self.shape_for(batch) {
            [columns] => (1, columns),
            [rows, columns] => (rows, columns),
            _ => (0, 0),
        }
    }

    fn bytes(&self, batch: usize) -> Option<usize> {
        let (rows, columns) = self.extent(batch);
        rows.checked_mul(columns)?.checked_mul(self.dtype.size())
    }

    fn check(&self) -> Result<()> {
        let fits = matches!(*self.shape, [_] | [_, Some(_)]);
        if fits && self.shape.iter().all(|&size| size != Some(0)) {
            return Ok(());
        }
        let expected = "one or two positive sizes, of which the first may be the batch's";
        Err(Error::invalid("inputs", expected, format!("{} of {:?}", self.name, self.shape)))
    }
}

/// The layout of a graph's memory.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Of the same samples.
    pub(crate) plans: Vec<Arc<EncodePlan>>,
    /// Plans for which values have to be looked at apart from the first one's.
    scans: Vec<usize>,
    /// Ascending.
    pub(crate) sizes: Vec<usize>,
    pub(super) inputs: Vec<InputSpec>,
    /// Where each input begins, and where the samples do.
    pub(crate) offsets: Vec<usize>,
    pub(crate) header: usize,
}

impl Layout {
    pub(super) fn new(
        plans: Vec<Arc<EncodePlan>>,
        mut sizes: Vec<usize>,
        inputs: Vec<InputSpec>,
    ) -> Result<Self> {
        sizes.sort_unstable();
        sizes.dedup();
        let largest = *sizes.last().unwrap_or(&0);
        if sizes.first().is_none_or(|&smallest| smallest == 0) {
            return Err(Error::invalid("batch_size", "one or more positive sizes", "none or 0"));
        }
        let too_large = || Error::invalid("batch_size", "sizes that fit memory", largest);
        let mut header = 0_usize;
        let mut offsets = Vec::new();
        for input in &inputs {
            input.check()?;
            offsets.push(header);
            let end = input.bytes(largest).and_then(|bytes| header.checked_add(bytes));
            header =
                end.and_then(|end| end.checked_next_multiple_of(ALIGN)).ok_or_else(too_large)?;
        }
        // The first plan's values are checked as they are copied.
        let mut checked = vec![Validation::Finite];
        let mut scans = Vec::new();
        for (i, plan) in plans.iter().enumerate() {
            let validation = Validation::of(plan);
            if i > 0 && !checked.contains(&validation) {
                scans.push(i);
            }
            checked.push(validation);
        }
        let layout = Self { plans, scans, sizes, inputs, offsets, header };
        let samples = layout.row_bytes().checked_mul(largest);
        samples.and_then(|bytes| bytes.checked_add(header)).ok_or_else(too_large)?;
        Ok(layout)
    }

    fn plan(&self) -> &EncodePlan {
        &self.plans[0]
    }

    pub(crate) fn dtype(&self) -> DType {
        self.plan().dtype()
    }

    pub(crate) fn features(&self) -> usize {
        self.plan().features()
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.features() * self.dtype().size()
    }

    pub(crate) fn largest(&self) -> usize {
        self.sizes[self.sizes.len() - 1]
    }

    /// Bytes of the block up to the end of so many samples.
    pub(crate) fn bytes(&self, batch: usize) -> usize {
        self.header + batch * self.row_bytes()
    }

    /// The place in the table of the smallest size that a batch fits.
    pub(crate) fn place(&self, batch: usize) -> usize {
        self.sizes.partition_point(|&size| size < batch)
    }

    /// Refuses what the graph was not captured for.
    pub(super) fn check(&self, input: &Input<'_>, others: &[Input<'_>]) -> Result<()> {
        input.refuse_affine(GRAPH)?;
        if input.dtype() != self.dtype() {
            return Err(Error::DType {
                argument: "data",
                expected: format!("{}, as the graph was captured for", self.dtype()),
                got: input.dtype().to_string(),
            });
        }
        if input.features() != self.features() || input.batch() > self.largest() {
            let sizes: Vec<String> = self.sizes.iter().map(ToString::to_string).collect();
            let (largest, features) = (self.largest(), self.features());
            let captured = sizes.join(", ");
            return Err(Error::Shape {
                argument: "data",
                expected: format!(
                    "(batch, {features}) with batch at most {largest} (captured for {captured})"
                ),
                got: format!("({}, {})", input.batch(), input.features()),
            });
        }
        if others.len() != self.inputs.len() {
            let expected = format!("{} input(s) beside the samples", self.inputs.len());
            return Err(Error::invalid("inputs", expected, others.len()));
        }
        for (spec, other) in self.inputs.iter().zip(others) {
            check_input(spec, other, input.batch())?;
        }
        Ok(())
    }

    /// Copies the other inputs to the beginning of a block.
    pub(crate) fn stage_inputs(&self, others: &[Input<'_>], block: &mut [u8]) {
        for (&offset, other) in self.offsets.iter().zip(others) {
            copy_rows(other, &mut block[offset..offset + other.num_bytes()]);
        }
    }

    /// Copies samples to `target`, which has their size, and checks their values. Where one names
    /// no state, all of the target is given values that do, as a later batch may end before them.
    pub(crate) fn stage(&self, input: &Input<'_>, target: &mut [u8]) -> Result<()> {
        let staged = self.copy(input, target).and_then(|()| self.scan(input));
        staged.inspect_err(|_| self.fill(target))
    }

    /// Gives rows values that name a state, whatever the encoding.
    pub(crate) fn fill(&self, rows: &mut [u8]) {
        let normed = |plan: &&Arc<EncodePlan>| matches!(plan.form(), Form::Amplitude);
        fill(self.plans.iter().find(normed).unwrap_or(&self.plans[0]), rows);
    }

    fn copy(&self, input: &Input<'_>, target: &mut [u8]) -> Result<()> {
        let large = target.len() > SMALL_BYTES;
        let staging = Staging::unchanged(self.plan(), input, large);
        let piece =
            |rows: Range<usize>| Piece { rows, columns: 0..input.features(), chunk: 0, offset: 0 };
        if !large {
            return staging.stage(&piece(0..input.batch()), target).map(drop);
        }
        let group = (GROUP_BYTES / self.row_bytes()).max(1);
        let first_error = Mutex::new(None::<(usize, Error)>);
        let groups = target.chunks_mut(group * self.row_bytes()).enumerate();
        STAGE.for_each(true, groups, |(i, target)| {
            let rows = i * group..input.batch().min((i + 1) * group);
            if let Err(error) = staging.stage(&piece(rows), target) {
                let mut found = first_error.lock();
                if found.as_ref().is_none_or(|&(other, _)| i < other) {
                    *found = Some((i, error));
                }
            }
        });
        first_error.into_inner().map_or(Ok(()), |(_, error)| Err(error))
    }

    fn scan(&self, input: &Input<'_>) -> Result<()> {
        let scan = |&plan: &usize| Staging::new(&self.plans[plan], input).scan(0..input.batch());
        self.scans.iter().try_for_each(scan)
    }
}

/// What an encoding asks of values on the host. What each asks, all ask: that they are finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Validation {
    Finite,
    Norm,
    Index,
    Bits,
}

impl Validation {
    fn of(plan: &EncodePlan) -> Self {
        match plan.form() {
            Form::Amplitude => Self::Norm,
            Form::Basis => Self::Index,
            Form::Product(Product { factor: Factor::Bit, .. }) => Self::Bits,
            Form::Product(_) | Form::Diagonal(_) => Self::Finite,
        }
    }
}

/// What knows no map of the features.
const GRAPH: &str = "a graph's input";

/// Refuses an input that is not what it was said to be; the message names it.
pub(super) fn check_input(spec: &InputSpec, input: &Input<'_>, batch: usize) -> Result<()> {
    input.refuse_affine(GRAPH)?;
    if input.dtype() != spec.dtype {
        return Err(Error::DType {
            argument: "inputs",
            expected: format!("{} for {:?}", spec.dtype, spec.name),
            got: input.dtype().to_string(),
        });
    }
    if (input.batch(), input.features()) != spec.extent(batch) {
        return Err(Error::Shape {
            argument: "inputs",
            expected: format!("{:?} for {:?}", spec.shape_for(batch), spec.name),
            got: format!("({}, {})", input.batch(), input.features()),
        });
    }
    if input.device() != crate::engine::Device::Cpu {
        return Err(Error::DeviceMismatch {
            argument: "inputs",
            expected: format!(
                "the host for {:?} (what is on the device can be used there)",
                spec.name
            ),
            got: input.device().to_string(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{EncodeSpec, Encoding, Rotation};
    use crate::engine::{Device, Engine};

    fn plan(encoding: Encoding, n: u32, features: usize) -> Arc<EncodePlan> {
        let values = vec![1.0; features];
        let spec = EncodeSpec::new(encoding, n).unwrap();
        Engine::open(Device::Cpu).unwrap().plan(&Input::sample(&values), &spec, None).unwrap()
    }

    const ANGLE: Encoding = Encoding::Angle { rotation: Rotation::Y };

    #[test]
    fn inputs_and_samples_have_places_of_their_own() {
        let input = |name: &str, shape: &[Option<usize>], dtype| InputSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            dtype,
        };
        let inputs = vec![
            input("labels", &[None], DType::I64),
            input("mask", &[None, Some(3)], DType::U8),
            input("weights", &[Some(5)], DType::F32),
        ];
        let layout = Layout::new(vec![plan(ANGLE, 4, 4)], vec![64, 8, 64, 16], inputs).unwrap();
        assert_eq!(layout.sizes, [8, 16, 64]);
        assert_eq!((&layout.offsets[..], layout.header), (&[0, 512, 768][..], 1024));
        assert_eq!(layout.bytes(16), 1024 + 16 * 4 * 8);
        assert_eq!([0, 1, 8, 9, 16, 64].map(|n| layout.place(n)), [0, 0, 0, 1, 1, 2]);

        let x = vec![0.5; 2 * 4];
        let (labels, mask, weights) = ([7_i64, 8], [1_u8, 2, 3, 4, 5, 6], [0.5_f32; 5]);
        let samples = Input::rows(&x, 4).unwrap();
        let others =
            [Input::sample(&labels), Input::rows(&mask, 3).unwrap(), Input::sample(&weights)];
        layout.check(&samples, &others).unwrap();
        let mut block = vec![0xa5; layout.bytes(64)];
        layout.stage_inputs(&others, &mut block);
        assert_eq!(block[..16], [7_i64, 8].map(i64::to_ne_bytes).concat());
        assert_eq!((&block[512..518], block[518]), (&mask[..], 0xa5));
        assert_eq!(block[768..772], 0.5_f32.to_ne_bytes());

        let error = layout.check(&samples, &others[..2]).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "inputs", .. }));
        let others = [others[0], others[2], others[1]];
        assert!(matches!(layout.check(&samples, &others).unwrap_err(), Error::DType { .. }));
        for shape in [&[][..], &[None, None], &[Some(0)], &[None, Some(2), Some(2)]] {
            let inputs = vec![input("bad", shape, DType::F32)];
            assert!(Layout::new(vec![plan(ANGLE, 4, 4)], vec![8], inputs).is_err(), "{shape:?}");
        }
    }

    #[test]
    fn what_does_not_fit_names_the_sizes() {
        let layout = Layout::new(vec![plan(ANGLE, 4, 4)], vec![2, 1], Vec::new()).unwrap();
        let x = [0.5; 12];
        let error = layout.check(&Input::rows(&x, 4).unwrap(), &[]).unwrap_err();
        assert!(error.to_string().contains("at most 2 (captured for 1, 2)"), "{error}");
        assert!(layout.check(&Input::rows(&x, 3).unwrap(), &[]).is_err());
        let single = [0.5_f32; 4];
        let error = layout.check(&Input::sample(&single), &[]).unwrap_err();
        assert!(matches!(error, Error::DType { .. }));
        for sizes in [vec![], vec![0, 4]] {
            assert!(Layout::new(vec![plan(ANGLE, 4, 4)], sizes, Vec::new()).is_err());
        }
        let huge = Layout::new(vec![plan(ANGLE, 4, 4)], vec![usize::MAX / 4], Vec::new());
        assert!(huge.is_err());
    }

    /// Every plan's own question is asked, whichever is the first; what was refused is filled.
    #[test]
    #[cfg_attr(miri, ignore = "large arrays")]
    fn values_are_checked_for_every_encoding() {
        let angle = plan(ANGLE, 3, 3);
        let amplitude = plan(Encoding::Amplitude, 2, 3);
        let bits = plan(Encoding::Basis, 3, 3);
        for rows in [3, 40_000] {
            let bad = rows - 2;
            for (plans, value, sample) in [
                (vec![Arc::clone(&angle), Arc::clone(&amplitude)], 0.0, bad),
                (vec![Arc::clone(&amplitude), Arc::clone(&angle)], 0.0, bad),
                (vec![Arc::clone(&angle), Arc::clone(&bits)], 2.0, bad),
                (vec![Arc::clone(&bits), Arc::clone(&angle)], f64::NAN, bad),
                (vec![angle.clone()], f64::INFINITY, bad),
            ] {
                let layout = Layout::new(plans, vec![rows], Vec::new()).unwrap();
                let mut x = vec![1.0_f64; 3 * rows];
                let mut target = vec![0; layout.bytes(rows)];
                layout.stage(&Input::rows(&x, 3).unwrap(), &mut target).unwrap();
                assert_eq!(target, x.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<_>>());
                x[3 * bad..3 * bad + 3].fill(value);
                let error = layout.stage(&Input::rows(&x, 3).unwrap(), &mut target).unwrap_err();
                assert_eq!(error.sample(), Some(sample), "{error}");
                let values: Vec<f64> = target
                    .chunks_exact(8)
                    .map(|bytes| f64::from_ne_bytes(bytes.try_into().unwrap()))
                    .collect();
                layout.stage(&Input::rows(&values, 3).unwrap(), &mut target.clone()).unwrap();
            }
        }
    }
}
