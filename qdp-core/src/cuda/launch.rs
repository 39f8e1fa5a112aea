//! Launching kernels.

use std::ptr;

use cudarc::driver::sys::{
    self, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig,
};

use super::driver::check;
use super::{Function, RawStream};
use crate::error::{Error, Result};

/// Extents in x, y and z.
pub type Dim3 = (u32, u32, u32);

/// What a launch may ask for beyond its shape. The default asks for nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaunchOptions {
    /// Lets the kernel start while the one before it on the stream still ends; it has to wait
    /// itself (`cudaGridDependencySynchronize`) before it touches what that one wrote.
    pub overlap_previous: bool,
    /// Blocks of a cluster, which run together and see each other's shared memory; none with 0 or
    /// 1. The grid's first extent has to be a multiple of it, and the device to have clusters.
    pub cluster: u32,
    /// Runs all blocks of the grid at once, so that they may wait for each other; more than the
    /// device can hold are an error.
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
    check("cuLaunchKernelEx", || unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            function.raw(),
            parameters.as_mut_ptr(),
            ptr::null_mut(),
        )
    })
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
        if self.overlap_previous {
            attributes[count].id =
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if self.cluster > 1 {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim =
                CUlaunchAttributeValue_union__bindgen_ty_1 { x: self.cluster, y: 1, z: 1 };
            count += 1;
        }
        if self.cooperative {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
            attributes[count].value.cooperative = 1;
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

        let both = LaunchOptions { cluster: 4, ..overlap };
        assert_eq!(both.write_to(&mut attributes), 2);
        let id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        assert_eq!(attributes[1].id, id);
        // SAFETY: the cluster's extents were written just now.
        let extents = unsafe { attributes[1].value.clusterDim };
        assert_eq!((extents.x, extents.y, extents.z), (4, 1, 1));

        let all = LaunchOptions { cooperative: true, ..both };
        assert_eq!(all.write_to(&mut attributes), MAX_ATTRIBUTES);
        assert_eq!(attributes[2].id, CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
        // SAFETY: the flag was written just now.
        assert_eq!(unsafe { attributes[2].value.cooperative }, 1);
    }
}
