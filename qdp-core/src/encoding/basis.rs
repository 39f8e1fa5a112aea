//! Basis encoding by index: one-hot.

use crate::error::{Error, Result};

/// The index that a value names, of `2^num_qubits`.
pub fn index(sample: usize, value: f64, num_qubits: u32) -> Result<usize> {
    let dim = (1u64 << num_qubits) as f64;
    if !value.is_finite() {
        return Err(super::amplitude::non_finite(sample, 0, value));
    }
    if value.fract() != 0.0 || value < 0.0 || value >= dim {
        return Err(Error::BasisValue {
            sample,
            position: 0,
            num_qubits,
            expected: format!("an integer from 0 to {}", (1u64 << num_qubits) - 1),
            value: Some(format!("{value}")),
        });
    }
    Ok(value as usize)
}

/// Checks one bit.
pub fn check_bit(sample: usize, position: usize, value: f64, num_qubits: u32) -> Result<()> {
    if !value.is_finite() {
        return Err(super::amplitude::non_finite(sample, position, value));
    }
    if ![0.0, 1.0].contains(&value) {
        return Err(Error::BasisValue {
            sample,
            position,
            num_qubits,
            expected: "bits, 0 or 1".to_owned(),
            value: Some(format!("{value}")),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_integers_in_range() {
        assert_eq!(index(0, 7.0, 3), Ok(7));
        for value in [8.0, -1.0, 0.5] {
            assert!(matches!(index(2, value, 3), Err(Error::BasisValue { sample: 2, .. })));
        }
        assert!(matches!(index(0, f64::NAN, 3), Err(Error::NonFinite { nan: true, .. })));
        assert!(check_bit(0, 1, 1.0, 3).is_ok());
        assert!(matches!(check_bit(0, 1, 2.0, 3), Err(Error::BasisValue { position: 1, .. })));
    }
}
