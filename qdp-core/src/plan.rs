//! An encode, resolved once.

use crate::element::{DType, Precision};
use crate::encoding::{EncodeSpec, Form};
use crate::error::Result;
use std::sync::OnceLock;

/// What identifies a plan: everything but the data and the batch size.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PlanKey {
    pub(crate) spec: EncodeSpec,
    pub(crate) dtype: DType,
    pub(crate) features: usize,
    pub(crate) precision: Precision,
}

/// An encoding of samples of one element type and length to states of one precision: validated,
/// reduced to the form a backend evaluates, and with what that backend prepared for it.
#[derive(Debug)]
pub struct EncodePlan {
    pub(crate) key: PlanKey,
    pub(crate) form: Form,
    /// The CUDA backend's share, made when it first runs the plan.
    pub(crate) cuda: OnceLock<crate::cuda::PreparedPlan>,
}

impl EncodePlan {
    pub(crate) fn new(key: PlanKey) -> Result<Self> {
        let form = key.spec.form(key.features)?;
        Ok(Self { key, form, cuda: OnceLock::new() })
    }

    pub(crate) fn is_for(
        &self,
        spec: &EncodeSpec,
        dtype: DType,
        features: usize,
        precision: Precision,
    ) -> bool {
        let key = &self.key;
        (key.dtype, key.features, key.precision) == (dtype, features, precision)
            && key.spec == *spec
    }

    /// The encoding, the number of qubits and the convention.
    pub fn spec(&self) -> &EncodeSpec {
        &self.key.spec
    }

    /// Element type of the samples.
    pub fn dtype(&self) -> DType {
        self.key.dtype
    }

    /// Values per sample.
    pub fn features(&self) -> usize {
        self.key.features
    }

    /// Element type of the states.
    pub fn precision(&self) -> Precision {
        self.key.precision
    }

    /// The mathematical form that the backend evaluates.
    pub fn form(&self) -> &Form {
        &self.form
    }

    /// Bytes of the states of `batch` samples.
    pub fn output_bytes(&self, batch: usize) -> u128 {
        batch as u128 * self.key.spec.dim() as u128 * self.key.precision.size() as u128
    }
}
