"""What one step is fed. Dimension key: B batch_size, T sequence_length."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens. All arrays are [B, T].

    Attributes:
      inputs: int32 token ids.
      targets: int32, the token after each input.
      weights: float32, 1 where input and target are real tokens of one document (and, in a store
        with a loss mask, the target is to be learnt), else 0.
      positions: int32, 0, 1, 2... restarting where a document (or its next part) begins in the row.
      segment_ids: int32 of the inputs: 1, 2, 3... in each row; 0 = padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


def make_batch(tokens: np.ndarray, segments: np.ndarray, loss: np.ndarray | None = None) -> Batch:
    """A Batch from stored rows: tokens, segments and loss (None: every target counts) [B, T+1]."""
    segment_ids = segments[:, :-1].astype(np.int32)
    real = segment_ids != 0
    weights = (segments[:, 1:] == segments[:, :-1]) & real
    if loss is not None:
        weights &= loss[:, 1:] != 0
    index = np.arange(segment_ids.shape[1], dtype=np.int32)
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return Batch(
        inputs=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        weights=weights.astype(np.float32),
        positions=np.where(real, index - start, 0).astype(np.int32),
        segment_ids=segment_ids,
    )
