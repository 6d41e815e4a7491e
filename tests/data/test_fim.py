"""Fill-in-the-middle: the text is all there, in the paper's order, whoever builds."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_build import config_of, source
from test_rows import reconstruct

from lemur_jax.config import ConfigError
from lemur_jax.data.build import FIM_TOKENS, build, existing
from lemur_jax.data.fim import Cut, FillInTheMiddle, draw
from lemur_jax.data.sources import documents
from lemur_jax.data.store import RowStore
from lemur_jax.data.tokenizer import Tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)


@pytest.fixture(scope="module")
def fim_tokenizer(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fim")
    tokenizer.save(directory)
    first = tokenizer.vocab_size
    added = {str(first + n): {"content": token} for n, token in enumerate(FIM_TOKENS)}
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    config["added_tokens_decoder"] = config.get("added_tokens_decoder", {}) | added
    path.write_text(json.dumps(config))
    (directory / "tokenizer.json").unlink(missing_ok=True)
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def fim(fim_tokenizer):
    return FillInTheMiddle(fim_tokenizer, FIM_TOKENS)


def joined(tokenizer, ids):
    """The text of ids that begin a text, followed by ids that go on with it."""
    stream = tokenizer.stream()
    return "".join(stream.push(int(index)) for index in ids) + stream.flush()


def taken_apart(tokenizer, ids):
    """(is SPM, prefix, middle, suffix) as ids, of a rearranged document without BOS and EOS."""
    pre, suf, mid = (tokenizer.id_of(token) for token in FIM_TOKENS)
    ids = list(map(int, ids))
    assert ids[0] == pre and [ids.count(special) for special in (pre, suf, mid)] == [1, 1, 1]
    at_suf, at_mid = ids.index(suf), ids.index(mid)
    assert at_suf < at_mid
    if at_suf == 1 and at_mid > 0 and ids[1] == suf:
        return True, None, ids[at_mid + 1 :], ids[2:at_mid]
    return False, ids[1:at_suf], ids[at_mid + 1 :], ids[at_suf + 1 : at_mid]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=TEXTS, data=st.data())
def test_the_text_is_all_there(fim, fim_tokenizer, text, data):
    """Red if `_before` is "" (each part gets a space of its own), or PSM and SPM change places."""
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    for spm in (False, True):
        ids = fim.encode(text, Cut(first, second, spm))
        is_spm, prefix, middle, suffix = taken_apart(fim_tokenizer, ids)
        if first or not spm:
            assert is_spm == (spm or not first)
        if not is_spm:
            assert joined(fim_tokenizer, [*prefix, *middle, *suffix]) == text
            assert joined(fim_tokenizer, prefix) == text[:first]
        elif spm:
            assert joined(fim_tokenizer, [*middle, *suffix]) == text


def test_orders_of_the_paper(fim, fim_tokenizer):
    """Red if <SUF> comes after the suffix, or SPM puts the prefix before <MID>."""
    pre, suf, mid = (fim_tokenizer.id_of(token) for token in FIM_TOKENS)
    a = fim_tokenizer.encode("ab ")
    b = fim_tokenizer.encode("\ncd")[2:]
    c = fim_tokenizer.encode("\n ef")[2:]
    assert fim.encode("ab cd ef", Cut(3, 5, False)).tolist() == [pre, *a, suf, *c, mid, *b]
    assert fim.encode("ab cd ef", Cut(3, 5, True)).tolist() == [pre, suf, *c, mid, *a, *b]


def test_draws():
    """Red if the rate is compared with another number, or cuts are not uniform and sorted."""
    texts = [f"document {n} of many" for n in range(4000)]
    cuts = [draw(text, 0, 0.5, 0.25) for text in texts]
    made = [cut for cut in cuts if cut is not None]
    assert abs(len(made) - 2000) < 5 * np.sqrt(4000 * 0.25)  # five standard deviations
    assert abs(sum(cut.spm for cut in made) - len(made) / 4) < 5 * np.sqrt(len(made) * 3 / 16)
    assert all(0 <= c.first <= c.second <= len(t) for c, t in zip(cuts, texts) if c)
    # The means of the smaller and the larger of two uniform numbers: a third, two thirds.
    shares = [(c.first / len(t), c.second / len(t)) for c, t in zip(cuts, texts) if c]
    assert np.allclose(np.mean(shares, axis=0), [1 / 3, 2 / 3], atol=0.03)
    assert draw("x", 0, 0.0, 0.5) is None and draw("x", 0, 1.0, 0.5) is not None
    assert [draw(t, 1, 0.5, 0.25) for t in texts] != cuts


def test_a_build_rearranges_the_same_documents_in_any_order(tmp_path, fim_tokenizer, quiet):
    """Red if `draw` gets the document's number, held-out documents are rearranged, or BOS and EOS
    are lost."""
    texts = [f"def function_{n}(x):\n    return x + {n}\n" for n in range(60)]
    found = {}
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": text, "path": text}) for text in order]
        (tmp_path / name / "f.jsonl").write_text("\n".join(lines))
        of = source(str(tmp_path / name / "f.jsonl"))
        config = config_of(tmp_path / name, fim_tokenizer, of, fim_rate=0.5, workers=1)
        counts = build(config, quiet)["sources"]["code"]["counts"]
        store = RowStore(tmp_path / name / "data" / "code" / "train")
        found[name] = {store.path(n): ids for n, ids in enumerate(map(tuple, reconstruct(store)))}
        bos, eos = fim_tokenizer.bos_id, fim_tokenizer.eos_id
        assert all(ids[0] == bos and ids[-1] == eos for ids in found[name].values())
        changed = [ids for ids in found[name].values() if fim_tokenizer.id_of(FIM_TOKENS[0]) in ids]
        assert len(changed) == counts["fim"] and 10 < counts["fim"] < 35
        held_out = RowStore(tmp_path / name / "data" / "code" / "validation")
        plain = [d.text for d in documents(of) if d.split == "validation"]
        assert [fim_tokenizer.decode(ids) for ids in reconstruct(held_out)] == plain
    assert found["a"] == found["b"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fim_rate": 1.5}, ["fim_rate=1.5", "[0, 1]"]),
        ({"fim_rate": 0.5, "bos_eos": "none"}, ["bos_eos='none'", "use 'both' or 'eos'"]),
        ({"fim_tokens": ("a", "b")}, ["fim_tokens=('a', 'b')", "three different"]),
    ],
)
def test_bad_settings(tmp_path, tokenizer, fields, words):
    """Red if a check of `_fim_problems` is dropped."""
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, tokenizer, source("x"), **fields)
    assert all(word in str(error.value) for word in words), error.value


def test_tokens_that_the_tokenizer_lacks(tmp_path, tokenizer):
    """Red if `load_tokenizer` does not ask for the tokens before anything is built."""
    (tmp_path / "f.txt").write_text("text")
    config = config_of(tmp_path, tokenizer, source(str(tmp_path / "f.txt")))
    config = dataclasses.replace(config, fim_rate=0.5)
    with pytest.raises(ConfigError, match=r"has no '<\|fim_prefix\|>', .*added_tokens_decoder"):
        existing(config)
    assert not (tmp_path / "data").exists()
