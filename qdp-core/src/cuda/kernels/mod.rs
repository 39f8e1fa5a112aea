//! The kernels of one device, resolved once, and the launches that evaluate a form.

mod amplitude;
mod args;
mod basis;
mod copy;
mod diagonal;
mod gather;
mod gradient;
mod product;
mod split;
mod tile;

pub(super) use args::CommonArgs;
pub(super) use gradient::GradientArgs;
pub(super) use split::Chunk;

use super::{Context, Function, LaunchOptions, Module, RawStream, launch_with};
use crate::encoding::Form;
use crate::error::{Error, Result, Unavailable};
use crate::plan::EncodePlan;
use std::ffi::CString;
use std::sync::Arc;

/// Every kernel.
pub(super) struct Kernels {
    amplitude: amplitude::Kernels,
    basis: basis::Kernels,
    copy: copy::Kernels,
    product: product::Kernels,
    diagonal: diagonal::Kernels,
    gather: gather::Kernels,
    gradient: gradient::Kernels,
    split: split::Kernels,
    /// Whether launches may overlap what precedes them: the device can, and the code, which the
    /// driver may have compiled from the PTX of an older architecture, waits for it.
    overlap: bool,
}

/// Device addresses of what the backend holds for an encode; 0 where the form needs none.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Held {
    pub(super) workspace: u64,
    /// Memory for the samples as rows; 0 reads them as they lie.
    pub(super) rows: u64,
    /// How often each pair is coupled, for a diagonal form.
    pub(super) multiplicity: u64,
}

impl Kernels {
    pub(super) fn load(context: &Arc<Context>) -> Result<Self> {
        let image = qdp_kernels::IMAGE.ok_or_else(|| Error::DeviceUnavailable {
            device: context.label(),
            reason: Unavailable::KernelsNotBuilt,
        })?;
        let loader = Loader { context, module: Module::load(context, image, qdp_kernels::ARCHS)? };
        Ok(Self {
            amplitude: amplitude::Kernels::load(&loader)?,
            basis: basis::Kernels::load(&loader)?,
            copy: copy::Kernels::load(&loader)?,
            product: product::Kernels::load(&loader)?,
            diagonal: diagonal::Kernels::load(&loader)?,
            gather: gather::Kernels::load(&loader)?,
            gradient: gradient::Kernels::load(&loader)?,
            split: split::Kernels::load(&loader)?,
            overlap: loader.is_hopper()?,
        })
    }

    /// Where launches for an encode go. They overlap the end of what precedes them, for which every
    /// kernel begins with `wait_for_previous`: a launch then costs the host 2.2 us instead of 2.7,
    /// and one of 2.6 us after another takes the device 2.6 us instead of 3.7 (H200, driver 580).
    /// A graph has ways of its own.
    pub(super) fn on(&self, stream: RawStream, captured: bool) -> LaunchStream {
        LaunchStream { stream, overlap_previous: self.overlap && !captured }
    }

    /// Bytes of device memory that an encode needs beside input and output.
    pub(super) fn workspace_bytes(plan: &EncodePlan, args: &CommonArgs) -> usize {
        match plan.form() {
            Form::Amplitude => amplitude::Kernels::workspace_bytes(plan.precision(), args),
            _ => 0,
        }
    }

    /// Bytes of device memory that make an encode faster: [`Held::rows`].
    pub(super) fn rows_bytes(plan: &EncodePlan, args: &CommonArgs) -> usize {
        match plan.form() {
            Form::Amplitude => gather::Kernels::bytes(args, plan.dtype()),
            _ => 0,
        }
    }

    /// Enqueues a copy of a few bytes, by a kernel.
    ///
    /// # Safety
    ///
    /// Both addresses, multiples of 16, must be valid on the device for so many bytes, in the order
    /// of `stream`.
    pub(super) unsafe fn enqueue_copy(
        &self,
        from: u64,
        to: u64,
        bytes: usize,
        stream: LaunchStream,
    ) -> Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { self.copy.enqueue(from, to, bytes as u64, stream) }
    }

    /// Enqueues the launches that evaluate the plan's form.
    ///
    /// # Safety
    ///
    /// The pointers in `args` and `held` must be valid for the input and output that `args`
    /// describes and for what [`Kernels::workspace_bytes`] and, unless it is 0,
    /// [`Kernels::rows_bytes`] asked for, in the order of `stream`.
    pub(super) unsafe fn enqueue(
        &self,
        plan: &EncodePlan,
        mut args: CommonArgs,
        held: Held,
        stream: LaunchStream,
    ) -> Result<()> {
        let precision = plan.precision();
        // SAFETY: passed on to the caller.
        unsafe {
            match plan.form() {
                Form::Amplitude => {
                    if held.rows != 0 {
                        args = self.gather.enqueue(args, plan.dtype(), held.rows, stream)?;
                    }
                    self.amplitude.enqueue(precision, args, held.workspace, stream)
                }
                Form::Basis => self.basis.enqueue(precision, args, stream),
                Form::Product(product) => self.product.enqueue(product, precision, args, stream),
                Form::Diagonal(diagonal) => {
                    self.diagonal.enqueue(diagonal, precision, args, held, stream)
                }
            }
        }
    }
}

/// Finds kernels by name.
struct Loader<'a> {
    context: &'a Arc<Context>,
    module: Arc<Module>,
}

impl Loader<'_> {
    fn function(&self, name: &str) -> Result<Function> {
        let name = CString::new(name)
            .map_err(|error| Error::invalid("kernel", "a name without NUL", error))?;
        self.module.function(&name)
    }

    /// Whether the device, and the code that runs on it, which the driver may have compiled from
    /// the PTX of an older architecture, have what came with compute capability 9.0.
    fn is_hopper(&self) -> Result<bool> {
        let device = self.context.compute_capability().0 >= 9;
        Ok(device && self.function("qdp_basis_c64")?.ptx_version()? >= 90)
    }

    /// The kernels for complex64 and complex128, to be indexed by [`Precision`].
    fn by_precision(&self, stem: &str) -> Result<[Function; 2]> {
        let function = |suffix| self.function(&format!("{stem}_{suffix}"));
        Ok([function("c64")?, function("c128")?])
    }
}

/// Where launches go.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaunchStream {
    stream: RawStream,
    overlap_previous: bool,
}

impl LaunchStream {
    /// For launches that wait for an event: nothing that they could overlap precedes them.
    pub(super) fn after_event(stream: RawStream) -> Self {
        Self { stream, overlap_previous: false }
    }
}

/// The shape of a launch in one dimension.
#[derive(Debug, Clone, Copy, Default)]
struct Shape {
    /// As many as there are parts of work; kernels stride over the rest where the grid ends.
    blocks: u64,
    threads: u32,
    /// Bytes of dynamic shared memory.
    shared: u32,
}

impl Shape {
    /// # Safety
    ///
    /// As for [`launch_with`].
    unsafe fn launch<P: Copy>(
        self,
        function: &Function,
        args: &P,
        stream: LaunchStream,
    ) -> Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { self.launch_as(LaunchOptions::default(), function, args, stream) }
    }

    /// [`Self::launch`] with options; whether it overlaps what precedes it is the stream's.
    ///
    /// # Safety
    ///
    /// As for [`launch_with`].
    unsafe fn launch_as<P: Copy>(
        self,
        options: LaunchOptions,
        function: &Function,
        args: &P,
        stream: LaunchStream,
    ) -> Result<()> {
        let grid = (self.blocks.min(i32::MAX as u64) as u32, 1, 1);
        let block = (self.threads, 1, 1);
        let LaunchStream { stream, overlap_previous } = stream;
        let options = LaunchOptions { overlap_previous, ..options };
        // SAFETY: passed on to the caller.
        unsafe { launch_with(function, grid, block, self.shared, stream, args, options) }
    }
}
