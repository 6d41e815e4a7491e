"""The examples of the packages' READMEs run as they are written."""

import re
import textwrap
from pathlib import Path

import lemur_kernels
import numpy as np


def names_of(package: str) -> dict:
    """What a README's first example defines."""
    text = (Path(lemur_kernels.__file__).parent / package / "README.md").read_text()
    example = re.search(r"^    import .*\n(?:    .*\n|\n)*", text, re.M).group()
    names: dict = {}
    exec(textwrap.dedent(example), names)
    return names


def test_attention():
    """Red when: the example names something that it does not define or import."""
    out = np.asarray(names_of("attention")["out"], np.float32)
    assert np.all(out[:, :5] == 1) and not np.any(out[:, 5])  # v is 1; the last token is padding


def test_cross_entropy():
    """Red when: the example names something that it does not define or import."""
    np.testing.assert_allclose(names_of("cross_entropy")["mean"], np.log(100), rtol=1e-3)


def test_decode_attention():
    """Red when: the example names something that it does not define or import."""
    names = names_of("decode_attention")
    assert names["out"].shape == names["q"].shape
    weight = 1 / (1 + 19 * np.exp(-8.0))  # of the new key, scores 64 / 8, among 19 of 0
    np.testing.assert_allclose(names["out"][0].astype(float), weight, rtol=0.01)
