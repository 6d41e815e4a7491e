"""Other people's formats, read without their libraries: the same model whatever it lies in."""

import collections
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import tiny_hf

torch = pytest.importorskip("torch", reason="writes the files that are read (extra: test)")

import foreign  # noqa: E402

from lemur_jax.convert import record, torch_file  # noqa: E402
from lemur_jax.convert.convert import convert  # noqa: E402
from lemur_jax.convert.errors import ConversionError  # noqa: E402
from lemur_jax.convert.model import open_source  # noqa: E402
from lemur_jax.convert.options import Options  # noqa: E402

VARIANTS = {
    "bin": lambda d, w: foreign.write_bin(d, w, torch),
    "bin_shards": lambda d, w: foreign.write_bin(d, w, torch, shards=3),
    "bin_legacy": lambda d, w: foreign.write_bin(d, w, torch, legacy=True),
    "meta": lambda d, w: foreign.write_meta(d, w, torch=torch),
    "meta_two": lambda d, w: foreign.write_meta(d, cut_vocabulary(w), files=2, torch=torch),
    "meta_rows": lambda d, w: foreign.write_meta(
        d, cut_vocabulary(w), files=2, embedding_axis=0, torch=torch, vocab_size=100
    ),
    "easylm": lambda d, w: foreign.write_easylm(d, w),
    "easylm_bare": lambda d, w: foreign.write_easylm(d, w, prefix=(), name="7b.stream"),
}


def cut_vocabulary(weights):
    """100 rows, which two files can share."""
    return {n: a[:100] if a.shape[0] == 101 else a for n, a in weights.items()}


def open_any(directory):
    return open_source(
        directory, max_positions=64 if (directory / "params.json").exists() else None
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_model_in_every_format(tmp_path, variant, dtype):
    """Red when (j r) becomes (r j) in META or EASYLM, META_SPLIT["wo"] becomes 0, or a storage
    offset is left out."""
    if not variant.startswith(("meta_two", "easylm")) and dtype != "float16":
        pytest.skip("one dtype is enough")
    weights, config = tiny_hf.weights(dtype), tiny_hf.CONFIG
    if variant in ("meta_rows", "meta_two"):
        weights, config = cut_vocabulary(weights), config | {"vocab_size": 100}
    reference = open_source(tiny_hf.write(tmp_path / "hf", weights, config))
    found = open_any(VARIANTS[variant](tmp_path / "x", weights))
    assert found.names == reference.names
    assert found.config.head_dim == 4 and found.config.kv_heads == 2
    assert found.config.param_dtype == dtype
    for name in reference.names:
        expected, array = reference.read(name), found.read(name)
        assert array.dtype == expected.dtype == found.dtype(name)
        assert array.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("variant", ["bin_shards", "meta_two", "easylm"])
def test_any_part_is_the_part_of_the_whole(tmp_path, variant):
    """Red when Part shifts a cut of heads by one, or forgets the padding of the vocabulary."""
    source = open_any(VARIANTS[variant](tmp_path / "x", tiny_hf.weights()))
    rng = np.random.default_rng(0)
    for name in source.names:
        whole = source.read(name)
        for _ in range(12):
            ends = [np.sort(rng.integers(0, n + 1, 2)) for n in whole.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            assert np.array_equal(source.read(name, index), whole[index])
        assert np.array_equal(source.read(name, 1), whole[1])
        assert np.array_equal(source.read(name, (-1,)), whole[-1])


def test_a_large_easylm_array_in_pieces(tmp_path, monkeypatch):
    """Red when the pieces of a chunked array are taken for the whole, or layout splits elsewhere
    than flax does."""
    import flax.serialization
    import msgpack

    from lemur_jax.convert import msgpack_stream

    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    monkeypatch.setattr(msgpack_stream, "PIECE_BYTES", 1000)
    arrays = {("a", "b"): np.arange(700, dtype=np.float32).reshape(70, 10), ("c",): np.ones(3)}
    packer = msgpack.Packer()
    path = tmp_path / "x.stream"
    with open(path, "wb") as file:
        for key, array in arrays.items():
            file.write(packer.pack((key, flax.serialization.to_bytes(array))))
    found = msgpack_stream.read_tensors(path)
    for key, array in arrays.items():
        assert np.array_equal(found[key].read(), array)
    part = found["a", "b"].read((slice(20, 60), slice(3, 7)))
    assert np.array_equal(part, arrays["a", "b"][20:60, 3:7])
    between, placed, size = msgpack_stream.layout(
        tmp_path / "y", [(key, array.shape, array.dtype) for key, array in arrays.items()]
    )
    assert size == path.stat().st_size
    raw = path.read_bytes()
    assert all(raw[at : at + len(data)] == data for at, data in between)
    assert [t.extents for t in placed] == [found[key].extents for key in arrays]


# ---------------------------------------------------------------------------------------------
# What must not be read
# ---------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/lemur_pickle_ran",))


def zip_with(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", contents)


@pytest.mark.parametrize("protocol", [1, 2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_by_name(tmp_path, protocol, legacy):
    """Red when `named` lets every global pass: REDUCE would then be refused, but not by name."""
    source = foreign.write_bin(tmp_path / "x", tiny_hf.weights(), torch)
    bad = pickle.dumps({"a": Evil()}, protocol=protocol)
    if legacy:
        (source / "pytorch_model.bin").write_bytes(bad)
    else:
        zip_with(source / "pytorch_model.bin", bad)
    with pytest.raises(ConversionError, match=r"posix.system'|nt.system'") as caught:
        open_source(source)
    assert "nothing was executed" in str(caught.value)
    assert str(source / "pytorch_model.bin") in str(caught.value)
    assert not os.path.exists("/tmp/lemur_pickle_ran")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, ["'a' is a int"]),
        (np.zeros(2), ["numpy"]),
        (torch.nn.Linear(2, 2), ["torch.nn.modules.linear.Linear"]),
        ("x", ["'a' is a str"]),
    ],
)
def test_what_is_no_tensor(tmp_path, value, words):
    """Red when an unknown class is taken for a dictionary, or a number is skipped."""
    torch.save({"a": value}, tmp_path / "x.bin")
    with pytest.raises(ConversionError) as caught:
        torch_file.read_tensors(tmp_path / "x.bin")
    for word in words:
        assert word in str(caught.value)


def test_what_torch_may_save(tmp_path):
    """Red when parameters, OrderedDict with _metadata, views or shared storages are refused."""
    model = torch.nn.Linear(3, 2)
    base = torch.arange(24.0).reshape(4, 6)
    state = model.state_dict()
    state["view"] = base[1:3]
    state["same"] = base
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    state["scalar"] = torch.tensor(3.0)
    assert isinstance(state, collections.OrderedDict)
    for legacy in (False, True):
        torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
        found = torch_file.read_tensors(tmp_path / "x.bin")
        for name, tensor in state.items():
            assert np.array_equal(found[name].read(), tensor.detach().numpy()), name
    torch.save({"t": torch.zeros(3, 4).T}, tmp_path / "y.bin")
    with pytest.raises(ConversionError, match=r"'t' \[4, 3\] is stored with strides \[1, 4\]"):
        torch_file.read_tensors(tmp_path / "y.bin")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.99])
def test_truncated_torch_files(tmp_path, legacy, keep):
    """Red when a storage may end behind the file (`_legacy`; a cut zip has no directory)."""
    source = foreign.write_bin(tmp_path / "x", tiny_hf.weights(), torch, legacy=legacy)
    path = source / "pytorch_model.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
    # torch lays storages out by their addresses: any tensor may be the one that is cut
    what = r"weight' \(storage '\d+'\) ends at" if legacy and keep > 0.1 else "(damaged|no PyTorch)"
    with pytest.raises(ConversionError, match=rf"{path}.*{what}"):
        open_source(source)


@pytest.mark.parametrize("at", [0, 0.4, 0.9999])
def test_a_flipped_bit_in_a_record_is_named(tmp_path, monkeypatch, at):
    """Red when `read` leaves the record unchecked, or `_sum` stops after a piece."""
    monkeypatch.setattr(record, "_PIECE_BYTES", 100)
    source = foreign.write_bin(tmp_path / "x", tiny_hf.weights(), torch)
    path, name = source / "pytorch_model.bin", "model.layers.1.mlp.down_proj.weight"
    (start, nbytes) = torch_file.read_tensors(path)[name].extents[0]
    raw = bytearray(path.read_bytes())
    raw[start + int(at * nbytes)] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ConversionError, match=rf"{path} is damaged.*{name}.*CRC-32.*data/"):
        convert(source, tmp_path / "o", Options(to="lemur"))
    assert not (tmp_path / "o").exists()


def test_records_without_checksums_are_read(tmp_path):
    """Red when a CRC of 0, which is none, is compared."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch_file.read_tensors(tmp_path / "x.bin")["a"].read().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("at", range(0, 60, 7))
@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bytes_never_crash(tmp_path, legacy, at):
    """Red when `load` lets a ValueError of a damaged pickle out."""
    state = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    raw = bytearray(buffer.getvalue())
    start = raw.index(b"}", 20) if legacy else raw.index(b"\x80\x02")
    raw[start + at] ^= 0x55
    path = tmp_path / "x.bin"
    path.write_bytes(raw)
    try:
        torch_file.read_tensors(path)
    except ConversionError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[:-5], ["ends at byte"]),
        (lambda raw: b"\xc1" + raw[1:], ["0xc1", "array"]),
        (lambda raw: raw[:2] + b"\xdb" + struct.pack(">I", 2**31) + raw[2:], ["byte"]),
        (lambda raw: raw + raw, ["appears twice"]),
        (lambda raw: raw.replace(b"float32", b"float99"), ["float99"]),
    ],
)
def test_damaged_streams(tmp_path, change, words):
    """Red when a length is believed, or a dtype is looked up unchecked."""
    source = foreign.write_easylm(tmp_path / "x", tiny_hf.weights())
    path = source / "streaming_params"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConversionError) as caught:
        open_source(source)
    for word in (*words, str(path)):
        assert word in str(caught.value)


# ---------------------------------------------------------------------------------------------
# Configs that disagree with the tensors
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"n_kv_heads": 4}, ["layers.0.attention.wk.weight", "expected [16, 16]", "[8, 16]"]),
        ({"vocab_size": 99}, ["vocab_size=99", "101 rows"]),
        ({"multiple_of": 64}, ["64 hidden units", "24"]),
        ({"moe": 1}, ["unknown key moe=1"]),
        ({"use_scaled_rope": True}, ["rope_scaling_factor"]),
        ({"rope_theta": 5e5}, ["rope.freqs", "rope_theta=500000.0"]),
        ({"n_layers": 3}, ["3 layers", "no layer 2"]),
        ({"norm_eps": None}, ["norm_eps=None"]),
        ({"multiple_of": 0}, ["multiple_of=0 must be a positive number"]),
        ({"ffn_dim_multiplier": "x"}, ["ffn_dim_multiplier='x' must be a positive number"]),
        ({"rope_theta": "x"}, ["rope_theta='x' must be a positive number"]),
        ({"vocab_size": "101"}, ["vocab_size='101'"]),
    ],
)
def test_params_that_disagree(tmp_path, params, words):
    """Red when params.json is believed where the tensors say otherwise."""
    source = foreign.write_meta(tmp_path / "x", tiny_hf.weights(), torch=torch, **params)
    with pytest.raises(ConversionError) as caught:
        open_any(source)
    for word in words:
        assert word in str(caught.value)


def test_positions_must_be_said(tmp_path):
    """Red when a length is guessed."""
    source = foreign.write_meta(tmp_path / "x", tiny_hf.weights(), torch=torch)
    with pytest.raises(ConversionError, match=r"--max_positions=4096 \(Llama 2\)"):
        open_source(source)
    assert open_source(source, max_positions=77).config.max_positions == 77


def test_parts_of_several_models(tmp_path):
    """Red when the replicated tensors of the second file are not compared with the first's."""
    source = foreign.write_meta(tmp_path / "x", cut_vocabulary(tiny_hf.weights()), 2, torch=torch)
    path = source / "consolidated.01.pth"
    part = torch.load(path)
    part["norm.weight"][3] += 1
    torch.save(part, path)
    with pytest.raises(ConversionError, match=r"'norm.weight' must be the same.*consolidated.01"):
        open_any(source)
    del part["layers.1.attention.wq.weight"]
    torch.save(part, path)
    with pytest.raises(ConversionError, match=r"layers.1.attention.wq.weight.*not in consolid"):
        open_any(source)
    path.rename(source / "consolidated.02.pth")
    with pytest.raises(ConversionError, match=r"not consolidated.01.pth: download"):
        open_any(source)


def test_a_stream_needs_its_config(tmp_path):
    """Red when a config is guessed from shapes, which do not tell heads or theta."""
    source = foreign.write_easylm(tmp_path / "x", tiny_hf.weights())
    (source / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config.json does not exist.*beside it"):
        open_source(source)


def test_an_unknown_tensor_in_a_stream(tmp_path):
    """Red when a key that no rule takes is dropped."""
    weights = tiny_hf.weights()
    source = foreign.write_easylm(tmp_path / "x", weights)
    extra = foreign.write_easylm(tmp_path / "y", weights, prefix=("params", "lora"))
    with open(source / "streaming_params", "ab") as file:
        file.write((extra / "streaming_params").read_bytes())
    with pytest.raises(ConversionError, match=r"unmatched tensor 'lora/transformer/wte/embedding'"):
        open_source(source)


def test_inverse_frequencies_of_bin_shards_are_checked(tmp_path):
    """Red when the buffers are dropped unread."""
    source = foreign.write_bin(tmp_path / "x", tiny_hf.weights("float16"), torch, shards=2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(ConversionError, match=r"inv_freq.*rope_theta=500000"):
        open_source(source)
