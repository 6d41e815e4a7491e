"""A sample of the shipped recipes against their budgets; the whole: make golden."""

import sys
from pathlib import Path

import pytest

from lemur_jax.plan import budgets, libtpu
from lemur_jax.plan.apart import apart

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import golden_pods  # noqa: E402

needs_libtpu = pytest.mark.skipif(bool(libtpu.missing()), reason=str(libtpu.missing()))


def test_every_recipe_has_a_budget_that_fits():
    """Red if a recipe was added without a budget, or a budget lies above the device's HBM."""
    held = budgets.read(golden_pods.BUDGETS)
    assert set(held) == set(golden_pods.cases())
    for name, budget in held.items():
        assert 0 < budget.hbm_bytes <= budget.usable_bytes, name
        # Nothing of a weight's size is reduced in full, or sent in float32, by an explicit step.
        for collective, entry in budget.collectives.items():
            if (name.endswith("train") and "float32" in collective) or "f32" in collective:
                assert entry["bytes"] < 2**30, (name, collective)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_lemur_70b on 70b_v4-512: train"])
def test_recipe_stays_in_its_budget(name):
    """Red if gradients were all-reduced again, a gather came before the cast, or an activation
    that is offloaded stayed on the device."""
    now = apart(golden_pods.compiled_budget, golden_pods.cases()[name])
    allowed = budgets.read(golden_pods.BUDGETS)[name]
    assert not list(budgets.excesses(now, allowed))
    gib = 2**30
    assert now.hbm_bytes < allowed.usable_bytes - gib
    assert now.seconds["3 hidden"] <= 37.0 and now.seconds["3 exposed"] <= 39.0
    assert now.seconds["1 hidden"] <= 41.0 and now.seconds["1 exposed"] <= 46.0
