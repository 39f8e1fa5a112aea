//! QDP's CUDA kernels as data: one fatbin, compiled from `cuda/*.cu` by the build script, and the
//! names of what it holds. This crate launches nothing and depends on nothing.

#![no_std]
#![forbid(unsafe_code)]

/// The fatbin, or `None` in a build with `QDP_SKIP_KERNELS=1`.
///
/// It starts at a multiple of 16 bytes; the driver reads its header in words of 8.
#[cfg(qdp_kernels)]
pub static IMAGE: Option<&[u8]> = Some(&ALIGNED.0);
/// The fatbin, or `None` in a build with `QDP_SKIP_KERNELS=1`.
#[cfg(not(qdp_kernels))]
pub static IMAGE: Option<&[u8]> = None;

/// The GPU architectures the image holds machine code for, ascending and separated by spaces, as
/// in `"75 80 90"`; empty without an image. The last one is there as PTX too, which the driver
/// compiles for GPUs newer than it.
pub const ARCHS: &str = env!("QDP_BUILT_ARCHS");

/// Bytes at an address that suits the driver; `include_bytes!` alone promises none.
#[cfg(qdp_kernels)]
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

#[cfg(qdp_kernels)]
static ALIGNED: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

#[cfg(test)]
mod tests {
    use super::{ARCHS, IMAGE};

    /// First word of a fatbin (`fatBinaryHeader` in the toolkit's `fatbinary_section.h`).
    const MAGIC: u32 = 0xba55_ed50;

    #[test]
    fn the_image_is_an_aligned_fatbin_or_absent() {
        match IMAGE {
            Some(image) => {
                assert_eq!(image.as_ptr().addr() % 16, 0);
                assert_eq!(image[..4], MAGIC.to_le_bytes());
                assert!(!ARCHS.is_empty());
            }
            None => assert_eq!(ARCHS, ""),
        }
    }

    #[test]
    fn architectures_ascend() {
        assert!(ARCHS.split_whitespace().map(|a| a.parse::<u32>().expect("a number")).is_sorted());
    }
}
