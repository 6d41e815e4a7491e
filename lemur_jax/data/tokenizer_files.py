"""Making tokenizer directories: training one, and writing Hugging Face's files beside the model."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from lemur_jax.config import ConfigError
from lemur_jax.data import tokenizer as _tokenizer
from lemur_jax.data.files import check_replaceable, new_directory
from lemur_jax.data.tokenizer import CONFIG, JSON, MODEL, SPACE, SPECIAL, Tokenizer

CHARACTERS_PER_LINE = 4_000  # longer lines are data, and make SentencePiece's training quadratic


def train(
    texts: Iterable[str],
    directory: str | Path,
    vocab_size: int = 8192,
    *,
    max_bytes: int = 12_000_000,
    character_coverage: float = 0.9999,
) -> Tokenizer:
    """Trains SentencePiece BPE with byte fallback, in Llama's settings, and writes a directory.

    Nothing is normalised: spaces, tabs and line ends come back exactly as they went in. Like
    Llama's, the vocabulary has no piece with a line end in it: text is learnt line by line and
    "\\n" is the byte piece <0x0A>. The result depends on the texts only: no sampling, no seed.

    Args:
      texts: documents, in an order that makes their first `max_bytes` a fair sample.
      directory: new, or one that an earlier call wrote (it is replaced whole).
      vocab_size: pieces, including unk 0, bos 1, eos 2 and 256 bytes; at least 300.
      max_bytes: of UTF-8 that are read; 10 MB train in about 2 s.
      character_coverage: fraction of the characters that get a piece; the rest are bytes.

    Raises ConfigError for an empty corpus or one too small for `vocab_size`.
    """
    if not isinstance(vocab_size, int) or vocab_size < 300:
        raise ConfigError(
            [f"vocab_size={vocab_size!r} must be at least 300: 3 specials and 256 bytes come first"]
        )
    check_replaceable(directory, "directory", MODEL)
    lines = list(_lines(texts, max_bytes))
    if not lines:
        raise ConfigError(
            ["texts holds no line of text: the corpus is empty; write one with `lemur data corpus`"]
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * CHARACTERS_PER_LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=4,  # fixed: written into the model, so part of the fingerprint
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            [
                f"vocab_size={vocab_size} cannot be trained on {len(lines)} lines: lower it or "
                f"give more text (SentencePiece says: {str(error).splitlines()[-1].strip()})"
            ]
        ) from error
    with new_directory(directory) as temporary:
        (temporary / MODEL).write_bytes(model.getvalue())
        write_hf_files(temporary)
    return Tokenizer.load(directory)


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    used = 0
    for text in texts:
        for line in text.split("\n"):
            if line and len(line) <= CHARACTERS_PER_LINE:
                yield line
        used += len(text.encode("utf-8"))
        if used >= max_bytes:
            return


def write_hf_files(directory: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json for tokenizer.model.

    With them `transformers.AutoTokenizer` gives the ids of `Tokenizer`, except that it parses
    special tokens out of text. An existing tokenizer_config.json keeps its added tokens.

    Raises ConfigError when the model is not a BPE with byte fallback in Llama's settings, because
    tokenizer.json could then not express it.
    """
    from sentencepiece import sentencepiece_model_pb2

    directory = Path(directory)
    path = directory / MODEL
    if not path.is_file():
        raise ConfigError([f"{path} is absent: only a SentencePiece tokenizer can be written out"])
    ours = Tokenizer.load(directory)
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    wanted = {
        "model_type": (trainer.model_type, 2),
        "byte_fallback": (trainer.byte_fallback, True),
        "treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, True),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
        "normalization": (normalizer.precompiled_charsmap, b""),
    }
    problems = [
        f"{path}: {name}={value!r} has no counterpart in tokenizer.json; it must be {legal!r}"
        for name, (value, legal) in wanted.items()
        if value != legal
    ]
    if problems:
        raise ConfigError(problems)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {p.piece: p.score for p in proto.pieces if p.type == kinds.NORMAL}
    added = [
        _added(piece.piece, index)
        for index, piece in enumerate(proto.pieces)
        if piece.type in (kinds.UNKNOWN, kinds.CONTROL)
    ] + [_added(content, index) for content, index in ours.added_tokens.items()]
    bos, eos, unk = (ours.piece(index) for index in (ours.bos_id, ours.eos_id, ours.unk_id))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, space],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                begin,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [ours.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                back,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in _merges(vocab, scores)],
        },
    }
    config = _tokenizer._read_json(directory / CONFIG) | {
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added
        },
        # Not LlamaTokenizer: transformers 5 rebuilds that class with a Metaspace pre-tokenizer,
        # which does not put a space before a text that begins with one, so ids differ [ran].
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "legacy": True,
    }
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    if ours.pad_id is not None:
        config["pad_token"] = special["pad_token"] = ours.piece(ours.pad_id)
    for name, content in ((JSON, spec), (CONFIG, config), (SPECIAL, special)):
        text = json.dumps(content, ensure_ascii=False, indent=1 if name != JSON else None)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _added(content: str, index: int) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": index, "content": content, **flags, "normalized": False, "special": True}


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first: SentencePiece merges by score alone.

    Only NORMAL pieces take part, so that no merge makes a control or byte piece out of text.
    """
    pairs = []
    for whole, score in scores.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in scores and right in scores:
                pairs.append((-score, vocab[left], vocab[right], left, right))
    pairs.sort(key=lambda pair: pair[:3])
    return [(left, right) for *_, left, right in pairs]
