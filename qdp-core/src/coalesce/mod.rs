//! Many small requests as one large one.

pub mod batcher;
