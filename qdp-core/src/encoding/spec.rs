//! What a user asks for: the encoding, its options, the number of qubits and the convention.

use super::Form;
use super::diagonal::{Diagonal, PairTerms};
use super::product::{Factor, Product};
use crate::error::{Error, Result};

/// The axis of the angle encoding's rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[allow(missing_docs)]
pub enum Rotation {
    X,
    #[default]
    Y,
    Z,
}

/// Which pairs of qubits an entangling layer couples.
///
/// All couplings of a layer commute, so only the set of pairs matters: Qiskit's
/// `reverse_linear` and `pairwise` couple the same pairs as `linear`, and `sca` the same as
/// `circular`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Entanglement {
    /// Every pair.
    #[default]
    Full,
    /// Neighbours.
    Linear,
    /// Neighbours, and the last with the first where there are more than two.
    Circular,
    /// The pairs listed; a pair listed twice is coupled twice.
    Pairs(Vec<(u32, u32)>),
}

impl Entanglement {
    /// The pairs for `n` qubits, as (lower, higher).
    pub fn pairs(&self, n: u32) -> Result<Vec<(u32, u32)>> {
        Ok(match self {
            Self::Full => (0..n).flat_map(|j| (j + 1..n).map(move |k| (j, k))).collect(),
            Self::Linear => (1..n).map(|k| (k - 1, k)).collect(),
            Self::Circular => {
                let ring = (n > 2).then(|| (0, n - 1));
                (1..n).map(|k| (k - 1, k)).chain(ring).collect()
            }
            Self::Pairs(pairs) => {
                for &(j, k) in pairs {
                    if j == k || j >= n || k >= n {
                        return Err(Error::invalid(
                            "entanglement",
                            format!("pairs of different qubits from 0 to {}", n.saturating_sub(1)),
                            format!("({j}, {k})"),
                        ));
                    }
                }
                pairs.iter().map(|&(j, k)| (j.min(k), j.max(k))).collect()
            }
        })
    }
}

/// Order of the qubits in the index, and the meaning of an angle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Convention {
    /// Little-endian, full angle: equal to qumat-qdp.
    #[default]
    Qdp,
    /// Little-endian, half angle.
    Qiskit,
    /// Big-endian (wire 0 is the most significant bit), half angle.
    PennyLane,
}

impl Convention {
    /// Whether qubit 0 is the most significant bit of the index.
    pub fn big_endian(self) -> bool {
        self == Self::PennyLane
    }

    /// What the angle encoding multiplies an angle by.
    pub fn angle_scale(self) -> f64 {
        if self == Self::Qdp { 1.0 } else { 0.5 }
    }

    /// The name in the public API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qdp => "qdp",
            Self::Qiskit => "qiskit",
            Self::PennyLane => "pennylane",
        }
    }
}

/// An encoding and its options. The formulas are in the README's table.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// `x_i / norm(x)`, zero-padded to `2^n`.
    Amplitude,
    /// One rotation per qubit, applied to `|0>`.
    Angle {
        /// Its axis.
        rotation: Rotation,
    },
    /// One-hot, by index or by bits.
    Basis,
    /// `2^(-n/2) exp(i sum_k x_k b_k)`.
    Phase,
    /// `H^n D H^n |0>` with single and pair phases given one by one.
    Iqp,
    /// `H^n D H^n |0>` with single phases only.
    IqpZ,
    /// Qiskit's `zz_feature_map`.
    Zz {
        /// How often the layer is repeated.
        reps: u32,
        /// Which pairs are coupled.
        entanglement: Entanglement,
    },
    /// PennyLane's `IQPEmbedding`.
    IqpEmbedding {
        /// How often the layer is repeated.
        reps: u32,
        /// Which pairs are coupled.
        entanglement: Entanglement,
    },
}

impl Encoding {
    /// The names in the public API, in the order of the README's table.
    pub const NAMES: [&'static str; 8] =
        ["amplitude", "angle", "basis", "phase", "iqp", "iqp-z", "zz", "iqp-embedding"];

    /// The most repetitions of a layer: far more than any use, few enough to end.
    pub const MAX_REPS: u32 = 1000;

    /// The encoding called `name`, with the options that were given.
    ///
    /// An option that the encoding does not have is an error.
    pub fn parse(
        name: &str,
        rotation: Option<Rotation>,
        reps: Option<u32>,
        entanglement: Option<&Entanglement>,
    ) -> Result<Self> {
        let encoding = match name {
            "amplitude" => Self::Amplitude,
            "angle" => Self::Angle { rotation: rotation.unwrap_or_default() },
            "basis" => Self::Basis,
            "phase" => Self::Phase,
            "iqp" => Self::Iqp,
            "iqp-z" => Self::IqpZ,
            "zz" => Self::Zz {
                reps: reps.unwrap_or(2),
                entanglement: entanglement.cloned().unwrap_or_default(),
            },
            "iqp-embedding" => Self::IqpEmbedding {
                reps: reps.unwrap_or(1),
                entanglement: entanglement.cloned().unwrap_or_default(),
            },
            _ => {
                let names = Self::NAMES.map(|name| format!("{name:?}")).join(", ");
                return Err(Error::invalid(
                    "encoding",
                    format!("one of {names}"),
                    format!("{name:?}"),
                ));
            }
        };
        let layered = matches!(encoding, Self::Zz { .. } | Self::IqpEmbedding { .. });
        let unused = [
            ("rotation", rotation.is_some() && !matches!(encoding, Self::Angle { .. })),
            ("reps", reps.is_some() && !layered),
            ("entanglement", entanglement.is_some() && !layered),
        ];
        match unused.into_iter().find(|&(_, given)| given) {
            Some((option, _)) => {
                Err(Error::invalid(option, format!("nothing with encoding {name:?}"), "a value"))
            }
            None => match reps {
                Some(count) if count == 0 || count > Self::MAX_REPS => {
                    let expected = format!("an integer from 1 to {}", Self::MAX_REPS);
                    Err(Error::invalid("reps", expected, count))
                }
                _ => Ok(encoding),
            },
        }
    }

    /// Whether features may be mapped where they are read
    /// ([`Input::with_affine`](crate::Input::with_affine)).
    pub fn takes_affine(&self) -> bool {
        !matches!(self, Self::Amplitude | Self::Basis)
    }

    /// The name in the public API.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Amplitude => "amplitude",
            Self::Angle { .. } => "angle",
            Self::Basis => "basis",
            Self::Phase => "phase",
            Self::Iqp => "iqp",
            Self::IqpZ => "iqp-z",
            Self::Zz { .. } => "zz",
            Self::IqpEmbedding { .. } => "iqp-embedding",
        }
    }
}

/// An encoding of a number of qubits in a convention.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EncodeSpec {
    encoding: Encoding,
    num_qubits: u32,
    convention: Convention,
}

impl EncodeSpec {
    /// The largest number of qubits whose state has a size in bytes that fits 64 bits with room
    /// to spare. What a machine can hold is far below.
    pub const MAX_QUBITS: u32 = 50;

    /// `encoding` of `num_qubits` qubits in the default convention.
    pub fn new(encoding: Encoding, num_qubits: u32) -> Result<Self> {
        if num_qubits == 0 || num_qubits > Self::MAX_QUBITS {
            return Err(Error::invalid(
                "num_qubits",
                format!("an integer from 1 to {}", Self::MAX_QUBITS),
                num_qubits,
            ));
        }
        if let Encoding::Zz { entanglement, .. } | Encoding::IqpEmbedding { entanglement, .. } =
            &encoding
        {
            entanglement.pairs(num_qubits)?;
        }
        Ok(Self { encoding, num_qubits, convention: Convention::default() })
    }

    /// The same in another convention.
    #[must_use]
    pub fn with_convention(self, convention: Convention) -> Self {
        Self { convention, ..self }
    }

    /// The encoding.
    pub fn encoding(&self) -> &Encoding {
        &self.encoding
    }

    /// The number of qubits.
    pub fn num_qubits(&self) -> u32 {
        self.num_qubits
    }

    /// The convention.
    pub fn convention(&self) -> Convention {
        self.convention
    }

    /// Amplitudes per state.
    pub fn dim(&self) -> usize {
        1 << self.num_qubits
    }

    /// Values per sample; for amplitude the most, for basis the number of bits.
    pub fn num_features(&self) -> usize {
        let n = self.num_qubits as usize;
        match self.encoding {
            Encoding::Amplitude => 1 << n,
            Encoding::Iqp => n + n * (n - 1) / 2,
            _ => n,
        }
    }

    /// Checks the number of values per sample.
    pub fn check_features(&self, features: usize) -> Result<()> {
        let most = self.num_features();
        let (fits, expected) = match self.encoding {
            Encoding::Amplitude => ((1..=most).contains(&features), format!("1 to {most} values")),
            Encoding::Basis => {
                (features == 1 || features == most, format!("1 index or {most} bits"))
            }
            _ => (features == most, format!("exactly {most} values")),
        };
        if fits {
            return Ok(());
        }
        Err(Error::FeatureCount {
            encoding: self.encoding.name(),
            num_qubits: self.num_qubits,
            expected,
            got: features,
        })
    }

    /// The form that a backend evaluates for samples of `features` values.
    pub fn form(&self, features: usize) -> Result<Form> {
        self.check_features(features)?;
        let big_endian = self.convention.big_endian();
        let product = |factor| Form::Product(Product { factor, big_endian });
        let layers = |scale, global, reps, final_hadamard| {
            product(Factor::Layers { scale, global, reps, final_hadamard })
        };
        let diagonal = |terms, pairs: Vec<(u32, u32)>, layers, final_hadamard| {
            Form::Diagonal(Diagonal::new(
                self.num_qubits,
                terms,
                &pairs,
                layers,
                final_hadamard,
                big_endian,
            ))
        };
        Ok(match &self.encoding {
            Encoding::Amplitude => Form::Amplitude,
            Encoding::Basis if features == self.num_qubits as usize && features > 1 => {
                product(Factor::Bit)
            }
            Encoding::Basis => Form::Basis,
            Encoding::Angle { rotation } => {
                product(Factor::Rotation { axis: *rotation, scale: self.convention.angle_scale() })
            }
            Encoding::Phase => layers(1.0, 0.0, 1, false),
            Encoding::IqpZ => layers(1.0, 0.0, 1, true),
            Encoding::Iqp => {
                let pairs = Entanglement::Full.pairs(self.num_qubits)?;
                if pairs.is_empty() {
                    layers(1.0, 0.0, 1, true)
                } else {
                    diagonal(PairTerms::Explicit, pairs, 1, true)
                }
            }
            Encoding::Zz { reps, entanglement } => {
                let pairs = entanglement.pairs(self.num_qubits)?;
                if pairs.is_empty() {
                    layers(2.0, 0.0, *reps, false)
                } else {
                    diagonal(PairTerms::Zz, pairs, *reps, false)
                }
            }
            Encoding::IqpEmbedding { reps, entanglement } => {
                let pairs = entanglement.pairs(self.num_qubits)?;
                if pairs.is_empty() {
                    layers(1.0, -0.5, *reps, false)
                } else {
                    diagonal(PairTerms::Multi, pairs, *reps, false)
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_belong_to_their_encodings() {
        assert!(Encoding::parse("angle", Some(Rotation::X), None, None).is_ok());
        let error = Encoding::parse("phase", None, Some(2), None).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "reps", .. }));
        let error = Encoding::parse("zz", None, Some(0), None).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "reps", .. }));
        let error = Encoding::parse("Amplitude", None, None, None).unwrap_err();
        assert!(error.to_string().contains("\"amplitude\""), "{error}");
    }

    #[test]
    fn entanglement_patterns() {
        assert_eq!(Entanglement::Full.pairs(3).unwrap(), [(0, 1), (0, 2), (1, 2)]);
        assert_eq!(Entanglement::Linear.pairs(3).unwrap(), [(0, 1), (1, 2)]);
        assert_eq!(Entanglement::Circular.pairs(3).unwrap(), [(0, 1), (1, 2), (0, 2)]);
        assert_eq!(Entanglement::Circular.pairs(2).unwrap(), [(0, 1)]);
        assert_eq!(Entanglement::Full.pairs(1).unwrap(), []);
        assert_eq!(Entanglement::Pairs(vec![(2, 0)]).pairs(3).unwrap(), [(0, 2)]);
        assert!(Entanglement::Pairs(vec![(0, 3)]).pairs(3).is_err());
        assert!(Entanglement::Pairs(vec![(1, 1)]).pairs(3).is_err());
    }

    #[test]
    fn feature_counts() {
        let spec = |encoding, n| EncodeSpec::new(encoding, n).unwrap();
        assert!(spec(Encoding::Amplitude, 3).check_features(8).is_ok());
        assert!(spec(Encoding::Amplitude, 3).check_features(0).is_err());
        assert!(spec(Encoding::Amplitude, 3).check_features(9).is_err());
        assert_eq!(spec(Encoding::Iqp, 4).num_features(), 10);
        assert!(spec(Encoding::Basis, 4).check_features(1).is_ok());
        assert!(spec(Encoding::Basis, 4).check_features(4).is_ok());
        assert!(spec(Encoding::Basis, 4).check_features(2).is_err());
        assert!(EncodeSpec::new(Encoding::Phase, 0).is_err());
        assert!(EncodeSpec::new(Encoding::Phase, 51).is_err());
    }
}
