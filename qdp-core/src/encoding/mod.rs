//! The mathematics of the encodings, apart from any device.
//!
//! Index `i = sum_k b_k 2^k`; `b_k` is the bit of qubit `k` (of qubit `n-1-k` in the big-endian
//! convention). A user names an [`Encoding`]; a backend evaluates a [`Form`]. Eight encodings
//! reduce to four forms:
//!
//! | form | encodings |
//! |---|---|
//! | [`Form::Amplitude`] | amplitude |
//! | [`Form::Basis`] | basis by index |
//! | [`Form::Product`] | every encoding that entangles nothing: angle, phase, basis by bits, iqp-z, and zz or iqp-embedding without pairs |
//! | [`Form::Diagonal`] | iqp, zz, iqp-embedding: layers of a Walsh-Hadamard transform and a diagonal whose phase is quadratic in the bits |

#![forbid(unsafe_code)]

pub mod amplitude;
pub mod basis;
pub mod diagonal;
pub mod product;

mod spec;

pub use diagonal::Diagonal;
pub use product::Product;
pub use spec::{Convention, EncodeSpec, Encoding, Entanglement, Rotation};

/// What a backend evaluates.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// `x_i / norm(x)`, zero-padded.
    Amplitude,
    /// One-hot at an index.
    Basis,
    /// A tensor product of single-qubit states.
    Product(Product),
    /// Walsh-Hadamard transforms and quadratic phases.
    Diagonal(Diagonal),
}
