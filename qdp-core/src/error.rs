//! One error type for the whole crate.
//!
//! Every variant carries what a caller needs to act on it: the argument, what was expected and
//! what came. The Python layer maps each variant to an exception class of its own.

/// Result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a CUDA device cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// libcuda was not found on this machine.
    #[error("no NVIDIA driver is installed (libcuda was not found); install driver 580 or later")]
    NoDriver,
    /// The driver is older than the kernels need.
    #[error(
        "the NVIDIA driver supports CUDA {found_major}.{found_minor}, but QDP needs CUDA \
         {needed_major}.{needed_minor} (driver 580 or later); update the driver"
    )]
    DriverTooOld {
        /// Major CUDA version that the driver supports.
        found_major: i32,
        /// Minor CUDA version that the driver supports.
        found_minor: i32,
        /// Major CUDA version needed.
        needed_major: i32,
        /// Minor CUDA version needed.
        needed_minor: i32,
    },
    /// The driver is there, but the ordinal is not.
    #[error("there is no such device: the driver sees {count} CUDA device(s)")]
    NoSuchDevice {
        /// How many devices the driver sees.
        count: i32,
    },
    /// This build holds no kernels.
    #[error(
        "this is a CPU-only build of QDP (QDP_SKIP_KERNELS=1); build again without it, or install \
         a full wheel"
    )]
    KernelsNotBuilt,
    /// The kernels hold no code for this device.
    #[error(
        "the kernels in this build (for {built}) do not run on this device, compute capability \
         {major}.{minor}; rebuild with QDP_CUDA_ARCHS={major}{minor}"
    )]
    NoKernelImage {
        /// Device compute capability, major.
        major: i32,
        /// Device compute capability, minor.
        minor: i32,
        /// The architectures in this build.
        built: String,
    },
    /// The driver is there and refused.
    #[error("{0}")]
    Driver(String),
}

/// Everything that can go wrong.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a value that it cannot have.
    #[error("{argument}: expected {expected}, got {got}")]
    InvalidArgument {
        /// Name of the argument, as in the public API.
        argument: &'static str,
        /// What it may be.
        expected: String,
        /// What it was.
        got: String,
    },
    /// An array has the wrong number of dimensions or the wrong extent.
    #[error("{argument}: expected shape {expected}, got {got}")]
    Shape {
        /// Name of the argument.
        argument: &'static str,
        /// The shape that was expected.
        expected: String,
        /// The shape that came.
        got: String,
    },
    /// A sample has a number of values that the encoding cannot use.
    #[error(
        "data: {encoding} encoding of {num_qubits} qubit(s) takes {expected} per sample, got {got}"
    )]
    FeatureCount {
        /// Name of the encoding.
        encoding: &'static str,
        /// Number of qubits asked for.
        num_qubits: u32,
        /// What the encoding takes, in words.
        expected: String,
        /// Values per sample in the input.
        got: usize,
    },
    /// An array has an element type that cannot be used here.
    #[error("{argument}: expected dtype {expected}, got {got}")]
    DType {
        /// Name of the argument.
        argument: &'static str,
        /// What it may be.
        expected: String,
        /// What it was.
        got: String,
    },
    /// A sample's norm is zero, so it names no state.
    #[error(
        "data: sample {sample} has zero norm (its sum of squares is below 2^-960) and cannot be \
         normalised"
    )]
    ZeroNorm {
        /// Index of the sample in the batch.
        sample: usize,
    },
    /// A sample's values are finite, but their sum of squares is not.
    #[error(
        "data: the sum of squares of sample {sample} is beyond the range of float64; scale the \
         sample down"
    )]
    NormOverflow {
        /// Index of the sample in the batch.
        sample: usize,
    },
    /// A value is NaN or infinite.
    #[error(
        "data: sample {sample} holds {} at position {position}; every value must be finite",
        if *.nan { "NaN" } else { "infinity" }
    )]
    NonFinite {
        /// Index of the sample in the batch.
        sample: usize,
        /// Index of the value in the sample.
        position: usize,
        /// NaN rather than an infinity.
        nan: bool,
    },
    /// A basis index (or bit) names no basis state.
    #[error(
        "data: sample {sample} holds {} at position {position}; basis encoding of {num_qubits} \
         qubit(s) takes {expected}",
        .value.as_deref().unwrap_or("a value out of range")
    )]
    BasisValue {
        /// Index of the sample in the batch.
        sample: usize,
        /// Index of the value in the sample.
        position: usize,
        /// Number of qubits asked for.
        num_qubits: u32,
        /// What it may be, in words.
        expected: String,
        /// The value, where it is known (device input is validated on the device).
        value: Option<String>,
    },
    /// An array lies on a device that this call cannot use.
    #[error("{argument}: expected an array on {expected}, got one on {got}")]
    DeviceMismatch {
        /// Name of the argument.
        argument: &'static str,
        /// The device that was expected.
        expected: String,
        /// The device it lies on.
        got: String,
    },
    /// A device cannot be opened.
    #[error("device {device:?}: {reason}")]
    DeviceUnavailable {
        /// The device that was asked for.
        device: String,
        /// What is missing.
        reason: Unavailable,
    },
    /// An allocation does not fit.
    #[error(
        "out of memory on {device}: {needed} bytes are needed, {free} of {total} bytes are free; \
         {hint}"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// Bytes in all.
        total: u64,
        /// What to lower.
        hint: &'static str,
    },
    /// The call is not legal while a CUDA stream is being captured.
    #[error("{call} is not possible while a CUDA stream is being captured: {hint}")]
    Capturing {
        /// What was tried.
        call: &'static str,
        /// What to do instead.
        hint: &'static str,
    },
    /// The caller's [`EncodeOptions::interrupt`](crate::EncodeOptions::interrupt) ended the call.
    #[error("interrupted")]
    Interrupted,
    /// A batcher's queue is full, and it refuses what it has no room for.
    #[error("the batcher's queue is full: {queue} request(s) wait")]
    QueueFull {
        /// How many may wait.
        queue: usize,
    },
    /// A request's deadline passed before its batch started.
    #[error("the deadline passed before the request's batch started")]
    DeadlineExceeded,
    /// The batcher takes no more requests.
    #[error("the batcher {reason}")]
    BatcherClosed {
        /// Why.
        reason: &'static str,
    },
    /// Asynchronous work was cancelled before it started.
    #[error("cancelled before it started")]
    Cancelled,
    /// Asynchronous work panicked.
    #[error("internal error: {message}")]
    Panicked {
        /// The panic's message.
        message: String,
    },
    /// A CUDA driver call failed.
    #[error("{call} failed with {name}: {description}")]
    Driver {
        /// The driver function.
        call: &'static str,
        /// The driver's name of the error, as `CUDA_ERROR_LAUNCH_FAILED`.
        name: String,
        /// The driver's description of it.
        description: String,
    },
}

impl Error {
    /// The sample whose values are to blame, where some are.
    pub fn sample(&self) -> Option<usize> {
        match self {
            Self::ZeroNorm { sample }
            | Self::NormOverflow { sample }
            | Self::NonFinite { sample, .. }
            | Self::BasisValue { sample, .. } => Some(*sample),
            _ => None,
        }
    }

    /// The same about another sample, where it is about one.
    #[must_use]
    pub(crate) fn about_sample(mut self, number: usize) -> Self {
        if let Self::ZeroNorm { sample }
        | Self::NormOverflow { sample }
        | Self::NonFinite { sample, .. }
        | Self::BasisValue { sample, .. } = &mut self
        {
            *sample = number;
        }
        self
    }

    /// An [`Error::InvalidArgument`].
    pub fn invalid(
        argument: &'static str,
        expected: impl Into<String>,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::InvalidArgument { argument, expected: expected.into(), got: got.to_string() }
    }
}
