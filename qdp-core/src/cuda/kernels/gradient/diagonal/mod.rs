//! Launches of `diagonal_gradient.cu` and `diagonal_moments.cu`.
//!
//! A block that can hold a state does all of it at once and reads its cotangent once. Larger states
//! go through a workspace, in rounds over the rows: tiles of neighbouring amplitudes and strided
//! ones take turns as in an encode, and what they find out is put together by two small launches.

mod passes;
mod whole;

use self::passes::Cut;
use self::whole::Whole;
use super::{Cotangent, GradientArgs};
use crate::cuda::Function;
use crate::cuda::kernels::diagonal::{
    DiagonalArgs, Kernels as Encode, Limits, MAX_TILE_CELLS, MIN_MADE_CELLS, REGISTER_BITS,
    WARP_BITS,
};
use crate::cuda::kernels::{CommonArgs, Held, LaunchStream, Loader, Shape};
use crate::element::{DType, Precision};
use crate::encoding::Diagonal;
use crate::error::Result;

/// Threads of a block of the launches that put moments together: `__launch_bounds__` there.
const COMBINE_THREADS: u64 = 256;

/// Mirrors `qdp::DiagonalGradientArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Args {
    diagonal: DiagonalArgs,
    source: Cotangent,
    states: u64,
    target: u64,
    sums: u64,
    before: u32,
    after: u32,
    add_sums: u32,
    memory_size: u32,
    stash_at: u32,
    features_at: u32,
}

/// Mirrors `qdp::TileMoments`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct TileMoments {
    sums: u64,
    tile_bits: u32,
    column_bits: u32,
    low_bit: u32,
}

/// Mirrors `qdp::CombineArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct CombineArgs {
    common: CommonArgs,
    multiplicity: u64,
    tiles: [TileMoments; 2],
    coefficients: u64,
    kind: u32,
    big_endian: u32,
}

pub(in crate::cuda::kernels) struct Kernels {
    /// By bits in registers less one, then by [`Precision`].
    any: Vec<[Function; 2]>,
    /// For one diagonal and for several, by bits of a cell's number less [`MIN_MADE_CELLS`], then
    /// by [`Precision`].
    whole: [Vec<[Function; 2]>; 2],
    pass: [Function; 2],
    combine: Function,
    features: Function,
    limits: Limits,
}

impl Kernels {
    pub(in crate::cuda::kernels) fn load(loader: &Loader<'_>) -> Result<Self> {
        let limits = Limits::of(loader);
        let any = (1..=REGISTER_BITS)
            .map(|bits| loader.by_precision(&format!("qdp_diagonal_gradient_{bits}")))
            .collect::<Result<Vec<_>>>()?;
        let whole = |name| {
            (MIN_MADE_CELLS..=MAX_TILE_CELLS)
                .map(|cells| loader.by_precision(&format!("qdp_diagonal_gradient_{name}_{cells}")))
                .collect::<Result<Vec<_>>>()
        };
        let whole = [whole("single")?, whole("layered")?];
        let pass = loader.by_precision("qdp_diagonal_gradient_pass")?;
        for kernel in any.iter().chain(whole.iter().flatten()).chain([&pass]).flatten() {
            kernel.set_max_dynamic_shared(limits.shared)?;
        }
        let combine = loader.function("qdp_diagonal_gradient_combine")?;
        let features = loader.function("qdp_diagonal_gradient_features")?;
        Ok(Self { any, whole, pass, combine, features, limits })
    }

    /// Bytes of device memory for what is kept between launches, of as many rows as a round has.
    pub(in crate::cuda::kernels) fn workspace_bytes(
        &self,
        diagonal: &Diagonal,
        precision: Precision,
        common: &CommonArgs,
    ) -> usize {
        if Whole::new(diagonal, precision, *common, self.limits).is_some() {
            return 0;
        }
        let cut = Cut::new(diagonal, precision, *common, self.limits);
        (cut.round(common.batch) * cut.row_bytes()) as usize
    }

    /// Enqueues the gradients of all rows. `encode` makes the states that layers pass through.
    ///
    /// # Safety
    ///
    /// As for [`Kernels::enqueue_gradient`](super::super::Kernels::enqueue_gradient).
    pub(in crate::cuda::kernels) unsafe fn enqueue(
        &self,
        encode: &Encode,
        diagonal: &Diagonal,
        (dtype, precision): (DType, Precision),
        args: GradientArgs,
        held: Held,
        stream: LaunchStream,
    ) -> Result<()> {
        let GradientArgs { common, cotangent } = args;
        let args = Args::new(common, cotangent, diagonal, held.multiplicity);
        if let Some(whole) = Whole::new(diagonal, precision, common, self.limits) {
            let (args, shape) = whole.launch(args);
            let kernels = match whole.made_cells() {
                Some(cells) => {
                    &self.whole[usize::from(diagonal.reps > 1)][(cells - MIN_MADE_CELLS) as usize]
                }
                None => &self.any[whole.register_bits as usize - 1],
            };
            // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
            return unsafe { shape.launch(&kernels[precision as usize], &args, stream) };
        }
        let cut = Cut::new(diagonal, precision, common, self.limits);
        let rows = cut.round(common.batch);
        let mut first = 0;
        while first < common.batch {
            let args = args.rows(first, rows.min(common.batch - first), dtype, precision);
            // SAFETY: the caller's promise holds for the rows of a round, which take no more of
            // the workspace than was asked for.
            unsafe { self.round(encode, diagonal, &cut, &args, held, stream)? };
            first += rows;
        }
        Ok(())
    }

    /// The launches for the rows that `args` tells.
    ///
    /// # Safety
    ///
    /// As for [`Kernels::enqueue`], where the rows take [`Cut::row_bytes`] each of the workspace.
    unsafe fn round(
        &self,
        encode: &Encode,
        diagonal: &Diagonal,
        cut: &Cut,
        args: &Args,
        held: Held,
        stream: LaunchStream,
    ) -> Result<()> {
        let common = args.diagonal.common;
        let places = cut.places(held.workspace, common.batch);
        let mut args = *args;
        let mut moments = [TileMoments::default(); 2];
        // The states before a diagonal are those after the transform that follows the others.
        let mut layers = diagonal.clone();
        layers.final_hadamard = true;
        for launch in cut.launches() {
            let mut args_now = cut.pass(args, launch);
            if let Some(rep) = launch.diagonal {
                if rep > 1 {
                    layers.reps = rep - 1;
                    let common =
                        CommonArgs { output: places.states, output_stride: common.dim(), ..common };
                    // SAFETY: the workspace has room for the states; nothing is reported.
                    unsafe { encode.enqueue(&layers, cut.precision, common, held, stream)? };
                    args_now.0.states = places.states;
                }
                let of_set = usize::from(launch.set > 0);
                let tile = &mut moments[of_set];
                args_now.0.add_sums = u32::from(tile.sums != 0);
                let DiagonalArgs { tile_bits, column_bits, low_bit, .. } = args_now.0.diagonal;
                let sums = places.sums[of_set];
                *tile = TileMoments { sums, tile_bits, column_bits, low_bit };
                args_now.0.sums = sums;
                args_now.0.diagonal.last_scale =
                    if rep < diagonal.reps || diagonal.final_hadamard { cut.scale } else { 1.0 };
            }
            args_now.0.target = if launch.last { 0 } else { places.cotangents };
            let (pass, shape) = args_now;
            // SAFETY: the caller's promise; the arguments mirror the kernel's parameter, and the
            // workspace has room for what tiles leave there.
            unsafe { shape.launch(&self.pass[cut.precision as usize], &pass, stream)? };
            args.source = Cotangent {
                values: places.cotangents,
                row_stride: common.dim() as i64,
                col_stride: 1,
            };
        }
        let combine = CombineArgs {
            common,
            multiplicity: held.multiplicity,
            tiles: moments,
            coefficients: places.coefficients,
            kind: diagonal.terms as u32,
            big_endian: u32::from(diagonal.big_endian),
        };
        let warps = common.batch * coefficients(common.num_qubits);
        let shape = |threads: u64| Shape {
            blocks: threads.div_ceil(COMBINE_THREADS),
            threads: COMBINE_THREADS as u32,
            shared: 0,
        };
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter, and the
        // workspace has room for the coefficients.
        unsafe {
            shape(warps << WARP_BITS).launch(&self.combine, &combine, stream)?;
            shape(common.batch * common.features).launch(&self.features, &combine, stream)
        }
    }
}

impl Args {
    fn new(common: CommonArgs, source: Cotangent, diagonal: &Diagonal, multiplicity: u64) -> Self {
        let mut args = DiagonalArgs::new(common, diagonal, multiplicity);
        // Tables are made of the diagonal, as where a state is.
        args.generate = 1;
        args.scale = transform_scale(diagonal);
        args.last_scale = if diagonal.final_hadamard { args.scale } else { 1.0 };
        Self {
            diagonal: args,
            source,
            states: 0,
            target: 0,
            sums: 0,
            before: 0,
            after: 0,
            add_sums: 0,
            memory_size: 0,
            stash_at: 0,
            features_at: 0,
        }
    }

    /// For `count` rows from `first` on.
    fn rows(mut self, first: u64, count: u64, dtype: DType, precision: Precision) -> Self {
        let common = &mut self.diagonal.common;
        let size = dtype.size() as u64;
        let offset = |stride: i64, size: u64| (first as i64 * stride * size as i64) as u64;
        common.input = common.input.wrapping_add(offset(common.row_stride, size));
        common.output = common.output.wrapping_add(first * common.output_stride * size);
        common.batch = count;
        let amplitude = precision.size() as u64;
        self.source.values =
            self.source.values.wrapping_add(offset(self.source.row_stride, amplitude));
        self
    }
}

/// A normalised transform's.
fn transform_scale(diagonal: &Diagonal) -> f64 {
    let scale = diagonal.scale(0);
    if diagonal.reps == 1 && diagonal.final_hadamard { scale.sqrt() } else { scale }
}

/// `coefficients` of moments.cuh.
fn coefficients(bits: u32) -> u64 {
    let bits = u64::from(bits);
    1 + bits * (bits + 1) / 2
}

#[cfg(test)]
mod cases {
    use super::*;
    use crate::encoding::{EncodeSpec, Encoding, Entanglement, Form};
    use crate::input::Input;

    pub(super) const H200: Limits = Limits { sms: 132, shared: 227 << 10 };
    const LIMITS: [Limits; 3] =
        [H200, Limits { sms: 28, shared: 99 << 10 }, Limits { sms: 40, shared: 64 << 10 }];

    pub(super) fn encodings() -> Vec<Encoding> {
        let mut encodings = vec![Encoding::Iqp];
        for reps in 1..=4 {
            encodings.push(Encoding::Zz { reps, entanglement: Entanglement::default() });
            encodings.push(Encoding::IqpEmbedding { reps, entanglement: Entanglement::default() });
        }
        encodings
    }

    pub(super) fn case(encoding: &Encoding, n: u32, batch: u64) -> (Diagonal, CommonArgs) {
        let spec = EncodeSpec::new(encoding.clone(), n).unwrap();
        let Form::Diagonal(diagonal) = spec.form(spec.num_features()).unwrap() else {
            panic!("not a diagonal encoding");
        };
        let mut common = CommonArgs::new(&Input::sample(&[0.0]), (0, 0), (0, 0, 0), n);
        common.batch = batch;
        (diagonal, common)
    }

    pub(super) fn for_all(mut check: impl FnMut(&Diagonal, Precision, CommonArgs, Limits)) {
        for limits in LIMITS {
            for precision in [Precision::Complex64, Precision::Complex128] {
                for encoding in encodings() {
                    for n in 2..=34 {
                        for batch in [1, 3, 64, 50_000] {
                            let (diagonal, common) = case(&encoding, n, batch);
                            check(&diagonal, precision, common, limits);
                        }
                    }
                }
            }
        }
    }
}
