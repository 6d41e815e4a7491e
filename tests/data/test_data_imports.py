"""What importing the data package costs: nobody waits 13 s for TensorFlow to sample."""

import subprocess
import sys

import pytest

SLOW = ("tensorflow", "seqio", "torch", "grain", "jax", "transformers", "tokenizers", "orbax")


@pytest.mark.parametrize(
    "module",
    [
        *("pipeline", "tokenizer", "tokenizer_files", "build", "corpus", "inspect"),
        *("inspect_page", "audit", "why", "exclude"),
    ],
)
def test_imports_stay_light(module):
    """Red if any file but tasks.py imports TensorFlow, or order.py's grain moves to its top."""
    code = (
        f"import lemur_jax.data.{module}, sys; "
        f"print([name for name in {SLOW} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
