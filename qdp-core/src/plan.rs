//! An encode, resolved once and found again.

use crate::element::{DType, Precision};
use crate::encoding::{EncodeSpec, Encoding, Form};
use crate::error::{Error, Result};
use arc_swap::ArcSwapOption;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

/// Plans kept per engine. More than a program uses; a bound so that a service fed with ever new
/// shapes does not grow.
const MAX_PLANS: usize = 1024;

/// A power of two.
const RECENT_PLANS: usize = 16;

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

/// An engine's plans. Threads may share it.
#[derive(Default)]
pub(crate) struct Plans {
    made: RwLock<HashMap<PlanKey, Arc<EncodePlan>>>,
    /// Plans of late, by a few bits of their key: found without a lock or a hash.
    recent: [ArcSwapOption<EncodePlan>; RECENT_PLANS],
}

impl Plans {
    /// The plan for such an encode, made now or found again.
    pub(crate) fn find(
        &self,
        spec: &EncodeSpec,
        dtype: DType,
        features: usize,
        precision: Precision,
    ) -> Result<Arc<EncodePlan>> {
        let place = spec.num_qubits() as usize + 5 * dtype as usize + 3 * precision as usize;
        let recent = &self.recent[place % RECENT_PLANS];
        if let Some(plan) = recent.load_full()
            && plan.is_for(spec, dtype, features, precision)
        {
            return Ok(plan);
        }
        let plan = self.find_by_key(PlanKey { spec: spec.clone(), dtype, features, precision })?;
        recent.store(Some(Arc::clone(&plan)));
        Ok(plan)
    }

    fn find_by_key(&self, key: PlanKey) -> Result<Arc<EncodePlan>> {
        // Nobody waits for these locks: a process may have been forked while a thread that it does
        // not have held one, and a plan is soon made.
        if let Some(plan) = self.made.try_read().and_then(|plans| plans.get(&key).cloned()) {
            return Ok(plan);
        }
        if key.dtype.is_complex() && *key.spec.encoding() != Encoding::Amplitude {
            return Err(Error::DType {
                argument: "data",
                expected: format!("a real type for {} encoding", key.spec.encoding().name()),
                got: key.dtype.to_string(),
            });
        }
        let plan = Arc::new(EncodePlan::new(key.clone())?);
        if let Some(mut plans) = self.made.try_write() {
            if plans.len() >= MAX_PLANS {
                plans.clear();
            }
            plans.insert(key, Arc::clone(&plan));
        }
        Ok(plan)
    }
}
