"""Fixtures of the checkpoint tests; their arrays and helpers are in saved_arrays.py."""

import time

import pytest


@pytest.fixture
def stragglers():
    """Lets the complaints come while this module, which expects them, still runs."""
    yield
    time.sleep(0.3)
