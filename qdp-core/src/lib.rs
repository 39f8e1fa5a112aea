//! QDP's core: classical data in, batches of quantum state vectors out.
//!
//! An [`Engine`] opens one device. It resolves an [`EncodeSpec`] and a shape to an [`EncodePlan`]
//! once, keeps it, and runs it on [`Input`]s; the result is a [`StateBatch`]. The mathematics is
//! in [`encoding`], the CPU backend in `cpu`, and everything that touches the CUDA driver in
//! [`cuda`].
//!
//! ```
//! use qdp_core::{Device, EncodeSpec, Encoding, Engine, Input, Precision};
//!
//! let engine = Engine::open(Device::Cpu)?;
//! let spec = EncodeSpec::new(Encoding::Amplitude, 1)?;
//! let state = engine.encode(&Input::sample(&[3.0, 4.0]), &spec, Some(Precision::Complex128))?;
//! let amplitudes: Vec<f64> = state.to_host()?.as_slice::<f64>()?.iter().map(|c| c.re).collect();
//! assert!((amplitudes[0] - 0.6).abs() < 1e-15 && (amplitudes[1] - 0.8).abs() < 1e-15);
//! # Ok::<(), qdp_core::Error>(())
//! ```

mod affine;
pub mod coalesce;
pub mod config;
mod cpu;
pub mod cuda;
pub mod element;
pub mod encoding;
mod engine;
pub mod error;
mod gradient;
pub mod graph;
mod input;
mod interrupt;
mod output;
pub mod pipeline;
mod plan;
mod shape;
mod state;
mod trace;

pub use affine::{Affine, Vector};
pub use coalesce::batcher::{Batcher, BatcherConfig, BatcherStats, WhenFull};
pub use element::{DType, Precision};
pub use encoding::{Convention, EncodeSpec, Encoding, Entanglement, Rotation};
pub use engine::{Device, EncodeOptions, Engine, MemoryInfo};
pub use error::{Error, Result, Unavailable};
pub use gradient::Gradient;
pub use graph::{Graph, GraphSpec};
pub use input::{Input, OwnedInput};
pub use output::Output;
pub use pipeline::config::PipelineConfig;
pub use pipeline::dispatch::{Dispatched, EncodeFuture};
pub use pipeline::estimate::Estimate;
pub use pipeline::stats::PipelineStats;
pub use plan::EncodePlan;
pub use state::StateBatch;
