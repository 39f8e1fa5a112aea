//! Launches of product.cu.

use super::{CommonArgs, LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::element::Precision;
use crate::encoding::product::Factor;
use crate::encoding::{Product, Rotation};
use crate::error::Result;

/// Bits of a chunk (twice `TABLE_BITS` in product.cu).
const CHUNK_BITS: u32 = 12;

/// Mirrors `qdp::ProductArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct ProductArgs {
    common: CommonArgs,
    scale: f64,
    global: f64,
    kind: u32,
    reps: u32,
    big_endian: u32,
    final_hadamard: u32,
}

pub(super) struct Kernels {
    product: [Function; 2],
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        Ok(Self { product: loader.by_precision("qdp_product")? })
    }

    /// # Safety
    ///
    /// As for [`super::Kernels::enqueue`].
    pub(super) unsafe fn enqueue(
        &self,
        product: &Product,
        precision: Precision,
        common: CommonArgs,
        stream: LaunchStream,
    ) -> Result<()> {
        let chunk = 1u64 << common.num_qubits.min(CHUNK_BITS);
        let blocks = common.batch * (common.dim() / chunk);
        let threads = (chunk / 4).clamp(32, 256) as u32;
        let shape = Shape { blocks, threads, ..Shape::default() };
        let args = ProductArgs::new(common, product);
        // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
        unsafe { shape.launch(&self.product[precision as usize], &args, stream) }
    }
}

impl ProductArgs {
    fn new(common: CommonArgs, product: &Product) -> Self {
        let (kind, scale) = match product.factor {
            Factor::Rotation { axis: Rotation::X, scale } => (0, scale),
            Factor::Rotation { axis: Rotation::Y, scale } => (1, scale),
            Factor::Rotation { axis: Rotation::Z, scale } => (2, scale),
            Factor::Layers { scale, .. } => (3, scale),
            Factor::Bit => (4, 0.0),
        };
        let (global, reps, final_hadamard) = match product.factor {
            Factor::Layers { global, reps, final_hadamard, .. } => {
                (global, reps, u32::from(final_hadamard))
            }
            _ => (0.0, 0, 0),
        };
        let big_endian = u32::from(product.big_endian);
        Self { common, scale, global, kind, reps, big_endian, final_hadamard }
    }
}
