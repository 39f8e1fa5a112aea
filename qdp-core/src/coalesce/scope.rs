//! A coalescer of borrowed slices, whose lifetime the compiler checks.

use super::{CoalesceOptions, CoalesceStats, Coalescer};
use crate::element::Element;
use crate::encoding::EncodeSpec;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::input::Input;
use crate::state::StateBatch;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

/// Scopes so far.
static SCOPES: AtomicU64 = AtomicU64::new(0);

impl Engine {
    /// Runs `body`, which hands in samples that live at least as long as this call, and encodes
    /// them together at its end.
    ///
    /// ```
    /// use qdp_core::{Device, EncodeSpec, Encoding, Engine};
    ///
    /// let engine = Engine::open(Device::Cpu)?;
    /// let spec = EncodeSpec::new(Encoding::Amplitude, 1)?;
    /// let samples = [vec![3.0, 4.0], vec![2.0], vec![f64::NAN, 0.0]];
    /// let (handles, mut coalesced) = engine.run_coalesced(&spec, Default::default(), |batch| {
    ///     samples.iter().map(|sample| batch.submit(sample)).collect::<Result<Vec<_>, _>>()
    /// })?;
    /// assert_eq!(coalesced.result(handles[1])?.as_slice::<f64>()?[0].re, 1.0);
    /// assert!(coalesced.result(handles[2]).is_err());
    /// # Ok::<(), qdp_core::Error>(())
    /// ```
    ///
    /// Samples that do not live as long are refused by the compiler:
    ///
    /// ```compile_fail,E0597
    /// # use qdp_core::{Device, EncodeSpec, Encoding, Engine};
    /// # let engine = Engine::open(Device::Cpu)?;
    /// # let spec = EncodeSpec::new(Encoding::Amplitude, 1)?;
    /// engine.run_coalesced(&spec, Default::default(), |batch| {
    ///     let sample = vec![3.0, 4.0];
    ///     batch.submit(&sample)
    /// })?;
    /// # Ok::<(), qdp_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of `body`, where nothing that waits is encoded; those of the options; those of an
    /// encode that no sample is to blame for. What is wrong with a sample is the error of its
    /// [`Coalesced::result`].
    pub fn run_coalesced<'env, R>(
        &self,
        spec: &EncodeSpec,
        options: CoalesceOptions,
        body: impl FnOnce(&mut Scope<'env>) -> Result<R>,
    ) -> Result<(R, Coalesced)> {
        let coalescer = Coalescer::new(self.clone(), spec.clone(), options)?;
        let number = SCOPES.fetch_add(1, Ordering::Relaxed);
        let mut scope = Scope { coalescer, number, data: PhantomData };
        let value = body(&mut scope)?;
        let mut coalescer = scope.coalescer;
        coalescer.flush()?;
        Ok((value, Coalesced { coalescer, number }))
    }
}

/// Where samples that live for `'env` are handed in.
#[derive(Debug)]
pub struct Scope<'env> {
    coalescer: Coalescer<()>,
    /// Of all scopes, so that each knows its own handles.
    number: u64,
    data: PhantomData<&'env [u8]>,
}

/// Names a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle {
    scope: u64,
    request: usize,
}

impl<'env> Scope<'env> {
    /// Hands in one sample. Nothing is copied.
    ///
    /// # Errors
    ///
    /// Those of encoding what waits, where this makes too much of it.
    pub fn submit<T: Element>(&mut self, sample: &'env [T]) -> Result<Handle> {
        self.submit_input(Input::sample(sample))
    }

    /// Hands in consecutive samples of `features` values each. Nothing is copied.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`](crate::Error::Shape) if they are not a whole number of samples; those of
    /// [`Self::submit`].
    pub fn submit_rows<T: Element>(
        &mut self,
        samples: &'env [T],
        features: usize,
    ) -> Result<Handle> {
        self.submit_input(Input::rows(samples, features)?)
    }

    /// Hands in samples, on the host or on the engine's device.
    ///
    /// # Errors
    ///
    /// Those of [`Self::submit`].
    pub fn submit_input(&mut self, input: Input<'env>) -> Result<Handle> {
        let request = self.coalescer.len();
        if self.coalescer.passes_through(&input) {
            let options = self.coalescer.options().encode;
            self.coalescer.pass_through(&input, &options)?;
        } else {
            // SAFETY: the memory is borrowed for 'env, which outlives the scope and its last flush.
            let due = unsafe { self.coalescer.submit(&input, ()) };
            due.map_or(Ok(()), |reason| self.coalescer.flush_for(reason))?;
        }
        Ok(Handle { scope: self.number, request })
    }

    /// Encodes what waits.
    ///
    /// # Errors
    ///
    /// Those that no request is to blame for.
    pub fn flush(&mut self) -> Result<()> {
        self.coalescer.flush()
    }
}

/// The states of a scope that has ended.
#[derive(Debug)]
pub struct Coalesced {
    // Nothing waits in it.
    coalescer: Coalescer<()>,
    number: u64,
}

impl Coalesced {
    /// The states of a request: a view of the batch that it was encoded in.
    ///
    /// # Errors
    ///
    /// What is wrong with its samples; [`Error::InvalidArgument`](crate::Error::InvalidArgument) for
    /// the handle of another scope.
    pub fn result(&mut self, handle: Handle) -> Result<StateBatch> {
        if handle.scope != self.number {
            return Err(Error::invalid("handle", "one of this scope", "another scope's"));
        }
        self.coalescer.result(handle.request)
    }

    /// All states, in the order of the requests.
    ///
    /// # Errors
    ///
    /// Those of [`Coalescer::states`].
    pub fn states(&mut self) -> Result<StateBatch> {
        self.coalescer.states()
    }

    /// What was done.
    pub fn stats(&self) -> &CoalesceStats {
        self.coalescer.stats()
    }
}
