"""FLOPs of a step, counted by hand."""

import dataclasses

import pytest
from small_models import MODEL

from lemur_jax.config import LoraConfig
from lemur_jax.train.metrics import flops_per_token

# E 32, F 64, 8 heads of 8, 2 kv heads: q and o 32 x 64, k and v 32 x 16, three of 32 x 64, 2 norms.
LAYER = 2 * 32 * 64 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
HEAD = 32 * 128  # the padding of 101 rows is multiplied too
ATTENTION = 6 * 2 * 64 * 16  # layers, width of the heads, tokens


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights(tied):
    """Red if the table were counted where it is only looked up, or not where it is the head."""
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    assert flops_per_token(model, 16) == 6 * (2 * LAYER + 32 + HEAD) + ATTENTION


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_adapters(tied, whole):
    """Frozen weights have no gradient of their own. Red if 4 were 6, or a head that is trained
    whole were counted as frozen too."""
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    adapters = LoraConfig(rank=3, targets=("wq", "w_down"), embeddings=whole)
    trained = 2 * 3 * ((32 + 64) + (64 + 32)) + whole * HEAD
    frozen = 2 * LAYER + 32 + (not whole) * HEAD
    assert flops_per_token(model, 16, adapters) == 4 * frozen + 6 * trained + ATTENTION
