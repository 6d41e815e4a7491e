"""More or fewer vocabulary rows: tokens added to a model, and to the files of its tokenizer.

Rows that the model has keep every bit. New ones are the mean of the old ones (the model then finds
a new token as likely as an average one) or zeros.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.json_file import json_text
from lemur_jax.convert.model import Index, Source, region_of
from lemur_jax.convert.small_files import GENERATION_CONFIG, HF_DIR, TOKENIZER_DIR
from lemur_jax.convert.stored import Shape
from lemur_jax.convert.turn import vocabulary_axis
from lemur_jax.convert.wrapped import Wrapped
from lemur_jax.sharding import padded_vocab

CHATML = ("<pad>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|diff_marker|>")
END = "<|im_end|>"
PAD = "<pad>"
NEW_ROWS = ("mean", "zeros")
_BAND_BYTES = 16 << 20


@dataclass(frozen=True)
class Resized(Wrapped):
    """A Source with another number of vocabulary rows. See model.Source.

    Attributes:
      source: the model as it is.
      resized: the config with the new vocab_size.
      fill: of each leaf with a vocabulary, what a new row is: [E].
      small_files: with the tokenizer's new tokens.
    """

    resized: ModelConfig
    fill: Mapping[str, np.ndarray]
    small_files: dict[str, bytes]

    @property
    def config(self) -> ModelConfig:
        """As Source."""
        return self.resized

    def shape(self, name: str) -> Shape:
        """As Source: padded for the new vocabulary."""
        axis, shape = vocabulary_axis(name), list(self.source.shape(name))
        if axis is not None:
            shape[axis] = padded_vocab(self.config)
        return tuple(shape)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """As Source: the old rows, then the new ones, then padding."""
        axis = vocabulary_axis(name)
        if axis is None:
            return self.source.read(name, index)
        region, squeezed = region_of(index, self.shape(name))
        wanted, kept = region[axis], min(self.source.config.vocab_size, self.config.vocab_size)
        out = np.zeros(tuple(part.stop - part.start for part in region), self.dtype(name))
        across = region[1 - axis]
        for low, high, old in ((0, kept, True), (kept, self.config.vocab_size, False)):
            low, high = max(low, wanted.start), min(high, wanted.stop)
            if low >= high:
                continue
            place, part = [slice(None)] * 2, list(region)
            place[axis] = slice(low - wanted.start, high - wanted.start)
            part[axis] = slice(low, high)
            if old:
                out[tuple(place)] = self.source.read(name, tuple(part))
            else:
                row = self.fill[name][across].astype(out.dtype)
                out[tuple(place)] = row if axis == 0 else row[:, None]
        return out[squeezed]

    def files(self) -> dict[str, bytes]:
        """As Source."""
        return self.small_files

    def changes(self, name: str) -> bool:
        """As Wrapped."""
        return vocabulary_axis(name) is not None


def resize(
    source: Source,
    tokens: Sequence[str],
    *,
    vocab_size: int | None = None,
    new_rows: str = "mean",
) -> Resized:
    """The model with these tokens behind those that its tokenizer has.

    Args:
      source: its tokenizer's files say which id is the next; without any it is its vocab_size.
      tokens: that the tokenizer has already keep their ids.
      vocab_size: rows of the result; None: as many as there are, or as the tokens need.
      new_rows: "mean" or "zeros".

    Raises:
      ConversionError: too few rows for the tokens, or an unknown `new_rows`.
    """
    if new_rows not in NEW_ROWS:
        raise ConversionError([f"--new_rows={new_rows} is unknown; legal: {', '.join(NEW_ROWS)}"])
    if len(set(tokens)) < len(tokens) or not all(tokens):
        raise ConversionError([f"--add_tokens={','.join(tokens)}: each token once, none empty"])
    files = source.files()
    ids = _ids(files, tokens, source.config.vocab_size)
    needed = max([index + 1 for index in ids.values()], default=1)
    rows = max(source.config.vocab_size, needed) if vocab_size is None else vocab_size
    _check_tokenizer(files, rows)
    if rows < needed:
        last = max(ids, key=ids.__getitem__)
        raise ConversionError(
            [f"--vocab_size={rows} is too small: token {last!r} has the id {ids[last]}"]
        )
    config = replace(source.config, vocab_size=rows)
    fill = {
        name: _mean(source, name) if new_rows == "mean" else np.zeros(source.config.embed)
        for name in source.names
        if vocabulary_axis(name) is not None and rows > source.config.vocab_size
    }
    return Resized(source, config, fill, _with_tokens(files, ids))


def _check_tokenizer(files: Mapping[str, bytes], rows: int) -> None:
    tokenizer = _open_tokenizer(files)
    if tokenizer is None or rows >= tokenizer.vocab_size:
        return
    last = tokenizer.vocab_size - 1
    raise ConversionError(
        [
            f"--vocab_size={rows} is too small: token {tokenizer.piece(last)!r} of the tokenizer "
            f"has the id {last}: give at least {last + 1}"
        ]
    )


def lost_rows(source: Source, resized: Resized) -> str | None:
    """What to say of rows that are cut; None if none are."""
    before, after = source.config.vocab_size, resized.config.vocab_size
    if after >= before:
        return None
    size = tokenizer_size(source.files())
    why = "no tokenizer beside it says whether they are in use"
    if size is not None:
        why = f"the tokenizer has {size} ids, so none of them is in use"
    return f"note: --vocab_size={after} cuts the last {before - after} of {before} rows; {why}"


def _mean(source: Source, name: str) -> np.ndarray:
    """The mean row, float64 [E]; summed in the same order whatever the budget."""
    axis, rows = vocabulary_axis(name), source.config.vocab_size
    total = np.zeros(source.config.embed)
    step = max(1, _BAND_BYTES // (8 * source.config.embed))
    for first in range(0, rows, step):
        band = [slice(None), slice(None)]
        band[axis] = slice(first, min(first + step, rows))
        total += source.read(name, tuple(band)).astype(np.float64).sum(axis=axis)
    return total / rows


# ---------------------------------------------------------------------------------------------
# The tokenizer's files
# ---------------------------------------------------------------------------------------------


def _ids(files: Mapping[str, bytes], tokens: Sequence[str], vocab_size: int) -> dict[str, int]:
    known, size = tokenizer_ids(files, tokens), tokenizer_size(files)
    following = vocab_size if size is None else size
    found = {}
    for token in tokens:
        if token in known:
            found[token] = known[token]
            continue
        found[token] = following
        following += 1
    return found


def _open_tokenizer(files: Mapping[str, bytes]):
    """Our tokenizer of these files; None if there are none."""
    import tempfile
    from pathlib import Path

    from lemur_jax.data.tokenizer import Tokenizer

    mine = {name: data for name, data in files.items() if name.startswith(f"{TOKENIZER_DIR}/")}
    if not any(n.endswith(("tokenizer.json", "tokenizer.model")) for n in mine):
        return None
    with tempfile.TemporaryDirectory() as directory:
        for name, data in mine.items():
            (Path(directory) / name.removeprefix(f"{TOKENIZER_DIR}/")).write_bytes(data)
        return Tokenizer.load(directory)


def tokenizer_size(files: Mapping[str, bytes]) -> int | None:
    """How many ids the tokenizer of these files has; None without one."""
    tokenizer = _open_tokenizer(files)
    return None if tokenizer is None else tokenizer.vocab_size


def tokenizer_ids(files: Mapping[str, bytes], tokens: Sequence[str]) -> dict[str, int]:
    """The ids of those of `tokens` that the tokenizer of these files has."""
    tokenizer = _open_tokenizer(files)
    if tokenizer is None:
        return {}
    ids = {token: tokenizer.id_of(token) for token in tokens}
    return {token: index for token, index in ids.items() if index is not None}


def _with_tokens(files: dict[str, bytes], ids: Mapping[str, int]) -> dict[str, bytes]:
    """The tokenizer's files with added tokens, and generation that stops at the end of a turn."""
    files = dict(files)
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    def edit(name: str, change) -> None:
        content = json.loads(files.get(name, b"{}"))
        change(content)
        files[name] = json_text(content).encode()

    def tokenizer_json(content: dict) -> None:
        there = {token["content"] for token in content.setdefault("added_tokens", [])}
        content["added_tokens"] += [
            {"id": index, "content": token, **entry, "special": True}
            for token, index in ids.items()
            if token not in there
        ]

    def tokenizer_config(content: dict) -> None:
        decoder = content.setdefault("added_tokens_decoder", {})
        for token, index in ids.items():
            decoder.setdefault(str(index), {"content": token, **entry, "special": True})
        if PAD in ids:
            content["pad_token"] = PAD

    has = {
        name.removeprefix(f"{TOKENIZER_DIR}/") for name in files if name.startswith(TOKENIZER_DIR)
    }
    if has & {"tokenizer.json", "tokenizer.model"} and ids:
        if "tokenizer.json" in has:
            edit(f"{TOKENIZER_DIR}/tokenizer.json", tokenizer_json)
        if "tokenizer.json" not in has or "added_tokens.json" in has:
            edit(f"{TOKENIZER_DIR}/added_tokens.json", lambda content: content.update(ids))
        edit(f"{TOKENIZER_DIR}/tokenizer_config.json", tokenizer_config)
        if PAD in ids and "special_tokens_map.json" in has:
            edit(
                f"{TOKENIZER_DIR}/special_tokens_map.json",
                lambda content: content.update(pad_token=PAD),
            )
    if f"{HF_DIR}/{GENERATION_CONFIG}" in files:
        edit(f"{HF_DIR}/{GENERATION_CONFIG}", lambda content: stop_at(content, ids))
    return files


def stop_at(generation: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Adds <|im_end|> to what ends generation, and <pad> as padding, where `ids` has them."""
    if END in ids:
        ends = generation.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        generation["eos_token_id"] = [ids[END], *(end for end in ends if end != ids[END])]
    if PAD in ids:
        generation["pad_token_id"] = ids[PAD]
