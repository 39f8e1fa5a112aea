//! Launching kernels.

use std::ptr;

use cudarc::driver::sys::{
    self, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
};

use super::driver::check;
use super::{Function, RawStream};
use crate::error::{Error, Result};

/// Extents in x, y and z.
pub type Dim3 = (u32, u32, u32);

/// What a launch may ask for beyond its shape. The default asks for nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaunchOptions {
    /// Blocks of a thread-block cluster, in each dimension a divisor of the grid. Above 8 in all,
    /// the kernel has to [allow it](Function::allow_non_portable_clusters).
    pub cluster: Option<Dim3>,
    /// Lets the kernel start while the one before it on the stream still ends; it has to wait
    /// itself (`cudaGridDependencySynchronize`) before it touches what that one wrote.
    pub overlap_previous: bool,
    /// All blocks run at once, so they may wait for one another; a grid larger than the device
    /// runs at once is refused.
    pub cooperative: bool,
}

const MAX_ATTRIBUTES: usize = 3;

/// Launches `function` with `params` as its one parameter, passed by value. Allocates nothing. An
/// empty grid launches nothing.
///
/// # Errors
/// [`Error::InvalidArgument`] where `P` is not as large as the kernel's parameter,
/// [`Error::Driver`], [`Error::Capturing`].
///
/// # Safety
/// `P` must be laid out as the kernel's parameter is, and every pointer in it must be valid for
/// what the kernel does with it, in the order of `stream`, until the kernel is done (and where
/// the stream is being captured, until the graph is gone).
pub unsafe fn launch<P: Copy>(
    function: &Function,
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
    stream: RawStream,
    params: &P,
) -> Result<()> {
    let options = LaunchOptions::default();
    // SAFETY: the caller's promise is the same.
    unsafe { launch_with(function, grid, block, shared_bytes, stream, params, options) }
}

/// [`launch`] with options.
///
/// # Errors
/// As [`launch`].
///
/// # Safety
/// As [`launch`].
pub unsafe fn launch_with<P: Copy>(
    function: &Function,
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
    stream: RawStream,
    params: &P,
    options: LaunchOptions,
) -> Result<()> {
    if size_of::<P>() != function.parameter_bytes() {
        let expected = format!("the kernel's {} bytes", function.parameter_bytes());
        return Err(Error::invalid("params", expected, size_of::<P>()));
    }
    if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
        return Ok(());
    }
    let mut attributes = [UNUSED; MAX_ATTRIBUTES];
    let count = options.write_to(&mut attributes);
    let config = config(grid, block, shared_bytes, stream, &mut attributes[..count]);
    let mut parameters = [ptr::from_ref(params).cast_mut().cast()];
    let _bound = function.module().context().bind()?;
    // SAFETY: the configuration and its attributes outlive the call. The driver reads as many
    // bytes behind the one parameter pointer as the kernel declares, which is the size of `P`,
    // and does so before it returns. What the kernel then does is the caller's promise.
    check("cuLaunchKernelEx", unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            function.raw(),
            parameters.as_mut_ptr(),
            ptr::null_mut(),
        )
    })
}

/// How many clusters of this shape the device runs at once; 0 where it cannot run one.
///
/// # Errors
/// [`Error::Driver`].
pub fn max_active_clusters(
    function: &Function,
    cluster: Dim3,
    block: Dim3,
    shared_bytes: u32,
) -> Result<u32> {
    let mut attributes = [UNUSED; MAX_ATTRIBUTES];
    let options = LaunchOptions { cluster: Some(cluster), ..LaunchOptions::default() };
    let count = options.write_to(&mut attributes);
    // One cluster is the smallest grid that it divides.
    let config = config(cluster, block, shared_bytes, RawStream::LEGACY, &mut attributes[..count]);
    let _bound = function.module().context().bind()?;
    let mut clusters = 0;
    // SAFETY: the configuration and its attributes outlive the call, nothing is launched, and
    // the driver writes one integer.
    check("cuOccupancyMaxActiveClusters", unsafe {
        sys::cuOccupancyMaxActiveClusters(&raw mut clusters, function.raw(), &raw const config)
    })?;
    Ok(clusters as u32)
}

const UNUSED: CUlaunchAttribute = CUlaunchAttribute {
    id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
    pad: [0; 4],
    value: CUlaunchAttributeValue { pad: [0; 64] },
};

impl LaunchOptions {
    /// Writes the attributes that these options ask for; answers how many.
    fn write_to(self, attributes: &mut [CUlaunchAttribute; MAX_ATTRIBUTES]) -> usize {
        let mut count = 0;
        if let Some((x, y, z)) = self.cluster {
            let attribute = &mut attributes[count];
            attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attribute.value.clusterDim =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
            count += 1;
        }
        if self.overlap_previous {
            let attribute = &mut attributes[count];
            attribute.id =
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attribute.value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if self.cooperative {
            let attribute = &mut attributes[count];
            attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
            attribute.value.cooperative = 1;
            count += 1;
        }
        count
    }
}

/// The driver's form of a launch. It points to `attributes`, which have to outlive it.
fn config(
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
    stream: RawStream,
    attributes: &mut [CUlaunchAttribute],
) -> CUlaunchConfig {
    CUlaunchConfig {
        gridDimX: grid.0,
        gridDimY: grid.1,
        gridDimZ: grid.2,
        blockDimX: block.0,
        blockDimY: block.1,
        blockDimZ: block.2,
        sharedMemBytes: shared_bytes,
        hStream: stream.raw(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_attributes() {
        let mut attributes = [UNUSED; MAX_ATTRIBUTES];
        assert_eq!(LaunchOptions::default().write_to(&mut attributes), 0);

        let overlap = LaunchOptions { overlap_previous: true, ..LaunchOptions::default() };
        assert_eq!(overlap.write_to(&mut attributes), 1);
        assert_eq!(
            attributes[0].id,
            CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        );

        let cluster = Some((8, 2, 1));
        let all = LaunchOptions { cluster, overlap_previous: true, cooperative: true };
        assert_eq!(all.write_to(&mut attributes), MAX_ATTRIBUTES);
        assert_eq!(attributes[2].id, CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
        assert_eq!(attributes[0].id, CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
        // SAFETY: this is the member that was written, three plain integers.
        let cluster = unsafe { attributes[0].value.clusterDim };
        assert_eq!((cluster.x, cluster.y, cluster.z), (8, 2, 1));
    }
}
