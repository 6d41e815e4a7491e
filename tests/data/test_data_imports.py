"""What importing the data package costs: nobody waits 13 s for TensorFlow to sample."""

import subprocess
import sys

import pytest

SLOW = (
    *("tensorflow", "seqio", "torch", "grain", "jax", "transformers", "tokenizers", "orbax"),
    *("pyarrow", "datasets", "fsspec", "zstandard", "array_record", "datasketch", "langdetect"),
)


@pytest.mark.parametrize(
    "module",
    [
        *("pipeline", "tokenizer", "tokenizer_files", "build", "corpus", "inspect"),
        *("sources", "epochs", "reading.formats", "cleaning.clean"),
        *("inspect_page", "audit", "why", "exclude"),
    ],
)
def test_imports_stay_light(module):
    """Red if a library of a format moves to the top of its reader, or order.py's grain to its."""
    code = (
        f"import lemur_jax.data.{module}, sys; "
        f"print([name for name in {SLOW} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
