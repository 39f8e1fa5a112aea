//! Cuts a call into rounds, chunks and pieces.
#![forbid(unsafe_code)]

use super::config::PipelineConfig;
use std::ops::Range;

/// Chunks of a split sample begin at multiples of so many values, as kernels sum them in parts
/// whose places must not depend on how it was cut.
pub(crate) const SPLIT_ALIGN: usize = 1 << 12;
/// What one thread stages at a time: small enough for its cache, as validation reads it again.
const PIECE_BYTES: usize = 64 << 10;
/// Chunks that a small batch is cut into, where they are not too small to be worth a copy each: the
/// copy of one overlaps staging the next.
const CHUNKS: usize = 8;

/// What one thread stages: some whole rows, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
    pub(crate) chunk: usize,
    /// Where it goes in the chunk's slot, in bytes.
    pub(crate) offset: usize,
}

/// What passes through a slot: some whole rows, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
    /// Of the cut's pieces; empty where nothing is staged.
    pub(crate) pieces: Range<usize>,
    /// As it travels.
    pub(crate) bytes: usize,
}

/// Samples as they lie and as they travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Samples {
    /// Values of each.
    pub(crate) features: usize,
    /// Bytes of a value on the link.
    pub(crate) size: usize,
    /// Whether they pass through page-locked memory, rather than lie in it already.
    pub(crate) staged: bool,
    /// Whether chunks begin small: where they are staged, so that the link has work soon.
    pub(crate) growing: bool,
}

impl Samples {
    fn row_bytes(&self) -> usize {
        self.features * self.size
    }

    /// Samples of a round.
    pub(crate) fn per_round(&self, config: &PipelineConfig, most_bytes: usize) -> usize {
        let bytes = config.max_batch_bytes.unwrap_or(most_bytes);
        let samples = config.max_batch_samples.unwrap_or(usize::MAX);
        (bytes / self.row_bytes().max(1)).clamp(1, samples.max(1))
    }
}

/// One round, cut up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) pieces: Vec<Piece>,
    /// The whole of it is one chunk that is not worth more than one stream.
    pub(crate) direct: bool,
    /// Samples are longer than a slot.
    pub(crate) split: bool,
}

impl Cut {
    pub(crate) fn new(rows: Range<usize>, samples: Samples, config: &PipelineConfig) -> Self {
        let bytes = rows.len() * samples.row_bytes();
        let split = samples.row_bytes() > config.max_chunk_bytes;
        let direct = bytes <= config.direct_bytes;
        let mut cut = Self { chunks: Vec::new(), pieces: Vec::new(), direct, split };
        // Chunks double from the least to the most.
        let most = (bytes / CHUNKS).clamp(config.min_chunk_bytes, config.max_chunk_bytes);
        let limit = |index: usize| {
            if direct {
                return config.max_chunk_bytes;
            }
            if !samples.growing {
                return most;
            }
            config.min_chunk_bytes.checked_shl(index.min(20) as u32).map_or(most, |b| b.min(most))
        };
        if !split {
            let mut row = rows.start;
            while row < rows.end {
                let count = (limit(cut.chunks.len()) / samples.row_bytes().max(1)).max(1);
                let end = rows.end.min(row + count);
                cut.add(row..end, 0..samples.features, samples);
                row = end;
            }
            return cut;
        }
        for row in rows {
            let mut column = 0;
            while column < samples.features {
                let values = limit(cut.chunks.len()) / samples.size;
                let values = (values / SPLIT_ALIGN).max(1) * SPLIT_ALIGN;
                let end = samples.features.min(column + values);
                cut.add(row..row + 1, column..end, samples);
                column = end;
            }
        }
        cut
    }

    /// Adds a chunk.
    fn add(&mut self, rows: Range<usize>, columns: Range<usize>, samples: Samples) {
        let (chunk, first) = (self.chunks.len(), self.pieces.len());
        let bytes = rows.len() * columns.len() * samples.size;
        if samples.staged {
            let most = PIECE_BYTES / samples.size;
            let row_bytes = columns.len() * samples.size;
            if columns.len() <= most {
                for row in rows.clone().step_by(most / columns.len()) {
                    self.pieces.push(Piece {
                        rows: row..rows.end.min(row + most / columns.len()),
                        columns: columns.clone(),
                        chunk,
                        offset: (row - rows.start) * row_bytes,
                    });
                }
            } else {
                for row in rows.clone() {
                    for column in columns.clone().step_by(most) {
                        self.pieces.push(Piece {
                            rows: row..row + 1,
                            columns: column..columns.end.min(column + most),
                            chunk,
                            offset: (row - rows.start) * row_bytes
                                + (column - columns.start) * samples.size,
                        });
                    }
                }
            }
        }
        self.chunks.push(Chunk { rows, columns, pieces: first..self.pieces.len(), bytes });
    }

    /// Bytes on the link.
    pub(crate) fn bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn configs() -> impl Strategy<Value = PipelineConfig> {
        (12u32..=16, 16u32..=22, 0usize..300_000).prop_map(|(least, most, direct)| PipelineConfig {
            min_chunk_bytes: 1 << least,
            max_chunk_bytes: 1 << most,
            direct_bytes: direct.min(1 << most),
            ..PipelineConfig::built_in(4)
        })
    }

    proptest! {
        #[test]
        fn chunks_and_pieces_cover_the_rows_once_and_in_order(
            config in configs(),
            first in 0usize..5,
            batch in 1usize..40,
            features in prop_oneof![1usize..300, 1000usize..100_000, 200_000usize..1_500_000],
            size in prop::sample::select(vec![1usize, 2, 4, 8, 16]),
            staged: bool,
        ) {
            let batch = batch.min(3_000_000 / features).max(1);
            let samples = Samples { features, size, staged, growing: staged };
            let cut = Cut::new(first..first + batch, samples, &config);
            let mut at = (first, 0);
            let mut next_piece = 0;
            for (index, chunk) in cut.chunks.iter().enumerate() {
                prop_assert!(!chunk.rows.is_empty() && !chunk.columns.is_empty());
                prop_assert_eq!((chunk.rows.start, chunk.columns.start), at);
                prop_assert!(chunk.bytes <= config.max_chunk_bytes);
                prop_assert_eq!(chunk.bytes, chunk.rows.len() * chunk.columns.len() * size);
                let whole = chunk.columns == (0..features);
                prop_assert!(whole || cut.split, "a sample of a batch is never split");
                prop_assert!(chunk.columns.start.is_multiple_of(SPLIT_ALIGN));
                at = if chunk.columns.end == features {
                    (chunk.rows.end, 0)
                } else {
                    (chunk.rows.start, chunk.columns.end)
                };
                prop_assert_eq!(chunk.pieces.start, next_piece);
                next_piece = chunk.pieces.end;
                let mut offset = 0;
                for piece in &cut.pieces[chunk.pieces.clone()] {
                    prop_assert_eq!((piece.chunk, piece.offset), (index, offset));
                    let values = piece.rows.len() * piece.columns.len();
                    prop_assert!(values > 0 && values * size <= PIECE_BYTES);
                    prop_assert!(piece.rows.len() == 1 || piece.columns == chunk.columns);
                    offset += values * size;
                }
                prop_assert_eq!(offset, if staged { chunk.bytes } else { 0 });
            }
            prop_assert_eq!(at, (first + batch, 0));
            prop_assert_eq!(next_piece, cut.pieces.len());
            prop_assert_eq!(cut.bytes(), batch * features * size);
            if cut.direct {
                prop_assert_eq!(cut.chunks.len(), 1);
            }
        }

        #[test]
        fn rounds_keep_to_their_bounds(
            features in 1usize..100_000,
            most_bytes in 1usize..10_000_000,
            most_samples in prop::option::of(1usize..1000),
        ) {
            let config = PipelineConfig {
                max_batch_bytes: Some(most_bytes),
                max_batch_samples: most_samples,
                ..PipelineConfig::built_in(4)
            };
            let samples = Samples { features, size: 8, staged: true, growing: true };
            let count = samples.per_round(&config, usize::MAX);
            prop_assert!(count >= 1 && count <= most_samples.unwrap_or(usize::MAX));
            prop_assert!(count == 1 || count * features * 8 <= most_bytes);
        }
    }
}
