"""One tiny model and one sampler, shared so that a shape is compiled once for all tests."""

import jax
import pytest
from letters import Letters, config

from lemur_jax.model.decoder import Decoder
from lemur_jax.sample.sampler import Sampler


@pytest.fixture(scope="session")
def model():
    return Decoder(config(), jax.random.key(0))


@pytest.fixture(scope="session")
def sampler(model):
    # Few shapes: prompts below 16 tokens and 18 to 33 new ones are the same three programs.
    return Sampler(model, Letters(), batches=(1, 8))
