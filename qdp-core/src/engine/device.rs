//! Devices: their names, and what memory they have.

use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Where an engine computes or an array lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// The host.
    Cpu,
    /// A CUDA device by ordinal.
    Cuda(u32),
}

impl Device {
    /// Refuses an array that lies elsewhere.
    pub(crate) fn check_holds(self, argument: &'static str, array_device: Self) -> Result<()> {
        if array_device == self {
            return Ok(());
        }
        let (expected, got) = (self.to_string(), array_device.to_string());
        Err(Error::DeviceMismatch { argument, expected, got })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let ordinal = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()),
        };
        ordinal.map(Self::Cuda).ok_or_else(|| {
            Error::invalid("device", "\"cpu\", \"cuda\" or \"cuda:N\"", format!("{text:?}"))
        })
    }
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Not in use by anybody.
    pub free: u64,
    /// In all.
    pub total: u64,
    /// Held by the engine's pool, in use or ready to be.
    pub reserved: u64,
    /// In use in the engine's pool.
    pub used: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_torch() {
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(Device::Cuda(3)));
        assert_eq!(Device::Cuda(3).to_string(), "cuda:3");
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
