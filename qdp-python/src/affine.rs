//! Tensors that scale and shift the features of another one.

use crate::errors::Result;
use crate::gradient::{Borrowed, borrow};
use crate::layout::Layout;
use crate::tensor::{LOWEST, is_traced, torch_table};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qdp_core::{Affine, Error, Vector};

/// The arguments `weight` and `bias`, as Python values.
#[derive(Clone, Copy)]
pub(crate) struct AffineArgs<'a, 'py> {
    pub(crate) weight: Option<&'a Bound<'py, PyAny>>,
    pub(crate) bias: Option<&'a Bound<'py, PyAny>>,
}

/// A map's tensors, borrowed; at least one.
pub(crate) struct Map<'py> {
    weight: Option<Borrowed<'py>>,
    bias: Option<Borrowed<'py>>,
}

/// What an encode with a map starts from.
pub(crate) enum BorrowedMap<'py> {
    None,
    Values(Box<Map<'py>>),
    /// torch has to know of the encode, as a tensor of the map wants a gradient, or has no values
    /// now.
    Traced,
}

impl<'py> AffineArgs<'_, 'py> {
    pub(crate) fn is_none(&self) -> bool {
        self.weight.is_none() && self.bias.is_none()
    }

    /// Adds the arguments that are there to keywords.
    pub(crate) fn add_to(&self, arguments: &Bound<'py, PyDict>) -> PyResult<()> {
        let py = arguments.py();
        for (name, value) in
            [(intern!(py, "weight"), self.weight), (intern!(py, "bias"), self.bias)]
        {
            if let Some(value) = value {
                arguments.set_item(name, value)?;
            }
        }
        Ok(())
    }

    /// Borrows tensors that have values.
    pub(crate) fn values(&self) -> Result<Option<Box<Map<'py>>>> {
        if self.is_none() {
            return Ok(None);
        }
        let weight = self.weight.map(|tensor| vector("weight", tensor)).transpose()?;
        let bias = self.bias.map(|tensor| vector("bias", tensor)).transpose()?;
        Ok(Some(Box::new(Map { weight, bias })))
    }

    /// Borrows the tensors, where torch need not know.
    pub(crate) fn borrow(&self) -> Result<BorrowedMap<'py>> {
        if self.is_none() {
            return Ok(BorrowedMap::None);
        }
        let traced = || -> PyResult<bool> {
            for tensor in [self.weight, self.bias].into_iter().flatten() {
                if torch_table(tensor)?.is_some() && is_traced(tensor)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        match self.values() {
            Ok(Some(map))
                if map.layouts().any(|layout| layout.ptr.addr() < LOWEST) && traced()? =>
            {
                Ok(BorrowedMap::Traced)
            }
            Ok(map) => Ok(map.map_or(BorrowedMap::None, BorrowedMap::Values)),
            // A tensor asks for a gradient, or has no memory to describe.
            Err(_) if traced()? => Ok(BorrowedMap::Traced),
            Err(failure) => Err(failure),
        }
    }
}

impl Map<'_> {
    pub(crate) fn layouts(&self) -> impl Iterator<Item = &Layout> {
        [&self.weight, &self.bias].into_iter().flatten().map(|tensor| &tensor.layout)
    }

    /// The map as the core reads it.
    pub(crate) fn affine(&self) -> Affine<'_> {
        let vector = |tensor: &Option<Borrowed<'_>>| {
            tensor.as_ref().map(|tensor| {
                let Layout { ptr, dtype, device, shape, .. } = tensor.layout;
                // SAFETY: torch vouches for its tensors, which are held for as long as `self` is
                // borrowed and on CUDA freed in the order of the stream; the values are without
                // gaps (`vector`). That nobody writes meanwhile is the caller's side of passing a
                // tensor.
                unsafe { Vector::from_raw(ptr, dtype, device, shape.1) }
            })
        };
        Affine { weight: vector(&self.weight), bias: vector(&self.bias) }
    }
}

/// Borrows a tensor of one dimension, or a copy of it without gaps.
fn vector<'py>(argument: &'static str, tensor: &Bound<'py, PyAny>) -> Result<Borrowed<'py>> {
    let borrowed = borrow(argument, tensor)?;
    let Layout { single, shape, .. } = borrowed.layout;
    if !single {
        let (expected, got) = ("(features,)".to_owned(), format!("({}, {})", shape.0, shape.1));
        return Err(Error::Shape { argument, expected, got }.into());
    }
    if borrowed.layout.has_gaps() {
        let py = tensor.py();
        return borrow(argument, &tensor.call_method0(intern!(py, "contiguous"))?);
    }
    Ok(borrowed)
}
