//! Arrow data as a batch of samples.
//!
//! A numeric column is one sample. A column of lists of one length is a batch, one sample a row. A
//! record batch or table with one such column is that; with several numeric columns, each row is a
//! sample.

use crate::errors::Result;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, UInt8Type};
use arrow_array::{Array, ArrayRef, GenericListArray, OffsetSizeTrait, PrimitiveArray, UInt8Array};
use arrow_schema::{DataType, Field, FieldRef};
use arrow_select::concat::concat;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3_arrow::input::AnyArray;
use qdp_core::pipeline::dispatch::catch;
use qdp_core::{DType, Error};
use std::sync::Arc;

/// Values of Arrow as rows of `features` values.
pub(crate) struct Samples {
    values: Values,
    pub(crate) dtype: DType,
    /// `None` for a column of plain values, which is one sample.
    pub(crate) batch: Option<usize>,
    pub(crate) features: usize,
}

enum Values {
    /// An array without nulls, of a type that [`dtype_of`] knows: read where it lies.
    Array(ArrayRef),
    /// Rows gathered from several columns.
    Gathered(Vec<u64>),
}

impl Samples {
    /// Address of the first value, valid while this value is alive, wherever it is moved.
    pub(crate) fn as_ptr(&self) -> *const u8 {
        match &self.values {
            Values::Array(array) => {
                let data = array.to_data();
                let offset = data.offset() * self.dtype.size();
                // The buffer is shared with `array`, so it outlives `data`.
                data.buffers()[0].as_ptr().wrapping_add(offset)
            }
            Values::Gathered(words) => words.as_ptr().cast(),
        }
    }
}

/// Reads whatever `__arrow_c_array__` or `__arrow_c_stream__` give.
pub(crate) fn import(object: &Bound<'_, PyAny>) -> Result<Samples> {
    let read = || object.extract::<AnyArray>()?.into_chunked_array().map_err(PyErr::from);
    // The crate panics about what its producer handed out before.
    let read = catch(|| Ok(read())).map_err(|panic| PyValueError::new_err(panic.to_string()))?;
    let (chunks, field) = read?.into_inner();
    let DataType::Struct(fields) = field.data_type() else {
        return column(&combine(&chunks, field.data_type())?, &field);
    };
    let table = combine(&chunks, field.data_type())?;
    if table.null_count() > 0 {
        return Err(nulls("", table.null_count()));
    }
    let columns = table.as_struct().columns();
    match (fields.as_ref(), columns) {
        ([], _) => Err(Error::Shape {
            argument: "data",
            expected: "at least one column".to_owned(),
            got: "none".to_owned(),
        }
        .into()),
        ([field], [array]) => column(array, field),
        (fields, columns) => rows(columns, fields),
    }
}

fn combine(chunks: &[ArrayRef], data_type: &DataType) -> Result<ArrayRef> {
    match chunks {
        [] => Ok(arrow_array::new_empty_array(data_type)),
        [only] => Ok(Arc::clone(only)),
        several => {
            let several: Vec<&dyn Array> = several.iter().map(AsRef::as_ref).collect();
            Ok(concat(&several).map_err(|error| PyValueError::new_err(error.to_string()))?)
        }
    }
}

/// One column: values are one sample, lists of one length are a batch.
fn column(array: &ArrayRef, field: &Field) -> Result<Samples> {
    let name = field.name();
    check_nulls(array, name)?;
    let (batch, features, values) = match array.data_type() {
        DataType::FixedSizeList(_, _) => {
            let list = array.as_fixed_size_list();
            let features = list.value_length() as usize;
            let start = if list.is_empty() { 0 } else { list.value_offset(0) as usize };
            let values = list.values().slice(start, list.len() * features);
            (Some(list.len()), features, values)
        }
        DataType::List(_) => equal_lists(array.as_list::<i32>(), name)?,
        DataType::LargeList(_) => equal_lists(array.as_list::<i64>(), name)?,
        _ => (None, array.len(), Arc::clone(array)),
    };
    let (values, dtype) = numbers(&values, name)?;
    Ok(Samples { values: Values::Array(values), dtype, batch, features })
}

fn equal_lists<O: OffsetSizeTrait>(
    list: &GenericListArray<O>,
    name: &str,
) -> Result<(Option<usize>, usize, ArrayRef)> {
    let offsets = list.value_offsets();
    let lengths = || offsets.windows(2).map(|pair| (pair[1] - pair[0]).as_usize());
    let features = lengths().next().unwrap_or(0);
    if let Some((row, length)) = lengths().enumerate().find(|&(_, length)| length != features) {
        return Err(Error::Shape {
            argument: "data",
            expected: format!("(batch, {features}) in {}", place(name)),
            got: format!("{length} values in row {row}"),
        }
        .into());
    }
    let values = list.values().slice(offsets[0].as_usize(), list.len() * features);
    Ok((Some(list.len()), features, values))
}

/// Several numeric columns: each row is a sample. Columns of different types meet in float64.
fn rows(columns: &[ArrayRef], fields: &[FieldRef]) -> Result<Samples> {
    let columns = columns
        .iter()
        .zip(fields)
        .map(|(array, field)| {
            check_nulls(array, field.name())?;
            numbers(array, field.name())
        })
        .collect::<Result<Vec<_>>>()?;
    let (batch, features) = (columns[0].0.len(), columns.len());
    let dtype = columns[0].1;
    if columns.iter().all(|&(_, other)| other == dtype) {
        let mut words = vec![0_u64; (batch * features * dtype.size()).div_ceil(8)];
        for (position, (array, _)) in columns.iter().enumerate() {
            let data = array.to_data();
            let size = dtype.size();
            let bytes = &data.buffers()[0].as_slice()[data.offset() * size..][..batch * size];
            let target = words.as_mut_ptr().cast::<u8>();
            for (row, value) in bytes.chunks_exact(size).enumerate() {
                // SAFETY: `words` has room for batch * features values, and value
                // `row * features + position` is one of them; it is memory of our own.
                unsafe {
                    let to = target.add((row * features + position) * size);
                    std::ptr::copy_nonoverlapping(value.as_ptr(), to, size);
                }
            }
        }
        return Ok(Samples {
            values: Values::Gathered(words),
            dtype,
            batch: Some(batch),
            features,
        });
    }
    let mut words = vec![0_u64; batch * features];
    for (position, (array, _)) in columns.iter().enumerate() {
        for (row, value) in doubles(array).enumerate() {
            words[row * features + position] = value.to_bits();
        }
    }
    Ok(Samples { values: Values::Gathered(words), dtype: DType::F64, batch: Some(batch), features })
}

/// The values as doubles.
fn doubles(array: &ArrayRef) -> Box<dyn Iterator<Item = f64> + '_> {
    use arrow_array::types::{
        Float16Type, Float32Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt16Type,
        UInt32Type, UInt64Type,
    };
    macro_rules! values {
        ($type:ty, $convert:expr) => {
            Box::new(array.as_primitive::<$type>().values().iter().map(|&x| $convert(x)))
        };
    }
    match array.data_type() {
        DataType::UInt8 => values!(UInt8Type, f64::from),
        DataType::UInt16 => values!(UInt16Type, f64::from),
        DataType::UInt32 => values!(UInt32Type, f64::from),
        DataType::UInt64 => values!(UInt64Type, |x| x as f64),
        DataType::Int8 => values!(Int8Type, f64::from),
        DataType::Int16 => values!(Int16Type, f64::from),
        DataType::Int32 => values!(Int32Type, f64::from),
        DataType::Int64 => values!(Int64Type, |x| x as f64),
        DataType::Float16 => values!(Float16Type, f64::from),
        DataType::Float32 => values!(Float32Type, f64::from),
        _ => values!(Float64Type, |x| x),
    }
}

/// The array, its bits as bytes if it is boolean, and its element type.
fn numbers(array: &ArrayRef, name: &str) -> Result<(ArrayRef, DType)> {
    check_nulls(array, name)?;
    if let Some(bits) = array.as_boolean_opt() {
        let bytes: UInt8Array =
            PrimitiveArray::<UInt8Type>::from_iter_values(bits.values().iter().map(u8::from));
        return Ok((Arc::new(bytes), DType::U8));
    }
    match dtype_of(array.data_type()) {
        Some(dtype) => Ok((Arc::clone(array), dtype)),
        None => Err(Error::DType {
            argument: "data",
            expected: format!("numbers or lists of numbers in {}", place(name)),
            got: array.data_type().to_string(),
        }
        .into()),
    }
}

fn dtype_of(data_type: &DataType) -> Option<DType> {
    Some(match data_type {
        DataType::UInt8 => DType::U8,
        DataType::UInt16 => DType::U16,
        DataType::UInt32 => DType::U32,
        DataType::UInt64 => DType::U64,
        DataType::Int8 => DType::I8,
        DataType::Int16 => DType::I16,
        DataType::Int32 => DType::I32,
        DataType::Int64 => DType::I64,
        DataType::Float16 => DType::F16,
        DataType::Float32 => DType::F32,
        DataType::Float64 => DType::F64,
        _ => return None,
    })
}

fn check_nulls(array: &ArrayRef, name: &str) -> Result<()> {
    match array.null_count() {
        0 => Ok(()),
        count => Err(nulls(name, count)),
    }
}

fn nulls(name: &str, count: usize) -> crate::errors::Failure {
    let expected = format!("no nulls in {}", place(name));
    Error::invalid("data", expected, format!("{count} null(s)")).into()
}

fn place(name: &str) -> String {
    if name.is_empty() { "the array".to_owned() } else { format!("column {name:?}") }
}
