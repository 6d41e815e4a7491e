"""What an outsider found: each of these hung, passed wrong bytes or blamed the wrong thing."""

import json
import re

import foreign
import numpy as np
import pytest
import tiny_hf

from lemur_jax.convert import plan
from lemur_jax.convert.convert import convert
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.options import Options
from lemur_jax.convert.verify import verify


def refusal(source, destination, **options):
    """What a conversion says when it refuses; it must leave nothing."""
    with pytest.raises(ConversionError) as caught:
        convert(source, destination, Options(**({"to": "lemur"} | options)))
    assert not destination.exists()
    assert not list(destination.parent.glob(f".{destination.name}.*"))
    return str(caught.value)


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def wide(directory):
    """A model whose table has 4 MiB and can be cut anywhere."""
    config = tiny_hf.CONFIG | {"vocab_size": 65536}
    weights = tiny_hf.weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.zeros((65536, 16), np.float32)
    return tiny_hf.write(directory, weights, config)


@pytest.mark.parametrize("to", ["lemur", "hf", "easylm"])
def test_a_budget_that_is_too_small_is_refused_at_once(tmp_path, to):
    """Red when `most` may be less than LEAST_BLOCK_BYTES (it counted one block an element), or the
    least that is named does not do."""
    source = wide(tmp_path / "hf")
    for max_ram in (10 << 20, 400 << 20, 512 << 20, 514 << 20):
        text = refusal(source, tmp_path / "o", to=to, max_ram=max_ram)
        least = int(re.search(r"is too little: \S+ .*the least is (\d+)MiB", text)[1])
        assert 514 < least < 600
    convert(source, tmp_path / "o", Options(to=to, max_ram=least << 20), dry_run=True)
    with pytest.raises(ConversionError, match="is too little"):
        convert(source, tmp_path / "o", Options(to=to, max_ram=least - 1 << 20), dry_run=True)


def test_verify_says_the_least(tmp_path):
    """Red when verify cuts without end, or says only to give more."""
    source = wide(tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"514\.0 MiB is too little.*least is 520MiB"):
        verify(source, source, max_ram=514 << 20)
    assert verify(source, source, max_ram=520 << 20) == []


def test_the_number_of_blocks_is_bounded():
    """Red when blocks of less than LEAST_BLOCK_BYTES are made of a leaf that is larger."""
    any_cut = plan.grain.Grain((1, 0, 0), (1, 1, 1))
    parts = [plan.Part("x", (80, 8192, 8192), 2, any_cut, any_cut)]
    shape = plan.block_shapes(parts, plan.PROGRAM_BYTES + (4 << 20), 4)["x"]
    assert np.prod(shape) * 2 >= plan.LEAST_BLOCK_BYTES // 2
