//! Shapes of two dimensions, and their errors.

use crate::error::{Error, Result};

/// How many rows of `width` values `len` values are; what both are called is for the error.
pub(crate) fn whole_rows(
    argument: &'static str,
    len: usize,
    width: usize,
    (rows, values): (&str, &str),
) -> Result<usize> {
    if width == 0 || !len.is_multiple_of(width) {
        return Err(Error::Shape {
            argument,
            expected: format!("a whole number of {rows} of {width} {values}"),
            got: format!("{len} {values}"),
        });
    }
    Ok(len / width)
}

/// Refuses an array of another shape.
pub(crate) fn check_shape(
    argument: &'static str,
    got: (usize, usize),
    expected: (usize, usize),
) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let text = |(rows, columns): (usize, usize)| format!("({rows}, {columns})");
    Err(Error::Shape { argument, expected: text(expected), got: text(got) })
}
