//! Launches of amplitude.cu.

use super::{CommonArgs, LaunchStream, Loader, Shape, Workspace};
use crate::cuda::Function;
use crate::element::{DType, Precision};
use crate::error::Result;

/// Rows up to this many amplitudes take one block; longer ones two kernels.
const ROW_BITS: u32 = 13;
/// Long rows are cut into chunks of this many amplitudes, or into [`MAX_CHUNKS`].
const CHUNK: u64 = 1 << 13;
/// A bound on the sums that each block of the second kernel adds up.
const MAX_CHUNKS: u64 = 1 << 10;

/// In the order of [`DType`], by which they are indexed.
const DTYPES: [(DType, &str); 14] = [
    (DType::U8, "u8"),
    (DType::U16, "u16"),
    (DType::U32, "u32"),
    (DType::U64, "u64"),
    (DType::I8, "i8"),
    (DType::I16, "i16"),
    (DType::I32, "i32"),
    (DType::I64, "i64"),
    (DType::F16, "f16"),
    (DType::BF16, "bf16"),
    (DType::F32, "f32"),
    (DType::F64, "f64"),
    (DType::C64, "c64"),
    (DType::C128, "c128"),
];

/// Mirrors `qdp::AmplitudeArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AmplitudeArgs {
    common: CommonArgs,
    partials: u64,
    chunk: u64,
}

struct OfDType {
    row: [Function; 2],
    norm: Function,
    scale: [Function; 2],
}

pub(super) struct Kernels {
    by_dtype: Vec<OfDType>,
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let by_dtype = DTYPES
            .iter()
            .map(|(_, dtype)| {
                Ok(OfDType {
                    row: loader.by_precision(&format!("qdp_amplitude_row_{dtype}"))?,
                    norm: loader.function(&format!("qdp_amplitude_norm_{dtype}"))?,
                    scale: loader.by_precision(&format!("qdp_amplitude_scale_{dtype}"))?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { by_dtype })
    }

    /// For the partial sums of long rows.
    #[expect(clippy::unused_self, reason = "thresholds may depend on the device")]
    pub(super) fn workspace(&self, _precision: Precision, args: &CommonArgs) -> Workspace {
        if args.num_qubits <= ROW_BITS {
            return Workspace::default();
        }
        let sums = args.batch * chunks_of_long_row(args.num_qubits);
        Workspace { bytes: sums as usize * size_of::<f64>(), zeroed: 0 }
    }

    /// # Safety
    ///
    /// As for [`super::Kernels::enqueue`].
    pub(super) unsafe fn enqueue(
        &self,
        precision: Precision,
        common: CommonArgs,
        workspace: u64,
        stream: LaunchStream,
    ) -> Result<()> {
        let kernels = &self.by_dtype[common.dtype as usize];
        let (dim, which) = (common.dim(), precision as usize);
        let shape = |blocks, threads| Shape { blocks, threads, ..Shape::default() };
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter.
        unsafe {
            if common.num_qubits <= ROW_BITS {
                let args = AmplitudeArgs { common, partials: 0, chunk: dim };
                let threads = (dim / 4).clamp(32, 1024) as u32;
                return shape(common.batch, threads).launch(&kernels.row[which], &args, stream);
            }
            let chunks = chunks_of_long_row(common.num_qubits);
            let args = AmplitudeArgs { common, partials: workspace, chunk: dim / chunks };
            let shape = shape(common.batch * chunks, 512);
            shape.launch(&kernels.norm, &args, stream)?;
            shape.launch(&kernels.scale[which], &args, stream)
        }
    }
}

fn chunks_of_long_row(num_qubits: u32) -> u64 {
    ((1u64 << num_qubits) / CHUNK).min(MAX_CHUNKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_by_element_type() {
        for (index, (dtype, _)) in DTYPES.iter().enumerate() {
            assert_eq!(*dtype as usize, index);
        }
    }

    #[test]
    fn chunks_divide_long_rows() {
        for n in ROW_BITS + 1..=40 {
            let chunks = chunks_of_long_row(n);
            assert_eq!((1u64 << n) % chunks, 0);
            assert!((1..=MAX_CHUNKS).contains(&chunks));
        }
    }
}
