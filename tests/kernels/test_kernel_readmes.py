"""The examples of the packages' READMEs run as they are written."""

import re
import textwrap
from pathlib import Path

import lemur_kernels
import numpy as np
import pytest

PACKAGES = ("attention", "cross_entropy")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_first_example_runs(package):
    """Red when: a name of an example goes, or an argument of the function it shows."""
    text = (Path(lemur_kernels.__file__).parent / package / "README.md").read_text()
    example = re.search(r"^    import .*\n(?:    .*\n|\n)*", text, re.M).group()
    names: dict = {}
    exec(textwrap.dedent(example), names)
    result = names["out" if "out" in names else "mean"]
    assert np.all(np.isfinite(np.asarray(result, np.float32)))
