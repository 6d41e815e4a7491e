"""A run on the tiny data set, its pipeline, and what `lemur check` says of them."""

import dataclasses

import pytest
from check_runs import make_config

from lemur_jax.check.run import certify
from lemur_jax.data.pipeline import Pipeline


@pytest.fixture(scope="session")
def run_config(tiny_data, tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("check") / "run", tiny_data)


@pytest.fixture(scope="session")
def pipeline(run_config):
    return Pipeline(run_config.data)


@pytest.fixture(scope="session")
def results(run_config):
    """(pipeline, only=...) -> {name: Result}; `only` leaves out what compiles."""

    def judge(pipeline, config=run_config, **options):
        certificate = certify(pipeline, dataclasses.replace(config), "text", **options)
        return {result.name: result for result in certificate.results}

    return judge
