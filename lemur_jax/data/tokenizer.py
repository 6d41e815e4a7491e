"""Text to token ids and back, from a directory. Imports sentencepiece; never TensorFlow.

A tokenizer directory holds `tokenizer.model` (SentencePiece) or, when there is none,
`tokenizer.json` (Hugging Face; Llama 3 has no other file), and optionally
`tokenizer_config.json` and `special_tokens_map.json` (added tokens, which ids begin and end).

Text is never parsed for special tokens: a user who types "</s>" gets the pieces of those four
characters. Callers splice special ids as ids. One exception to exactness comes with the format:
U+2581 ("▁") is SentencePiece's own spelling of a space and decodes as one.
"""

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from lemur_jax.config import ConfigError
from lemur_jax.data.words import SPACE, WordEncoder, is_separable

MODEL = "tokenizer.model"
JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
CHAT = ("chat_template.jinja", "chat_format.json")
FILES = (MODEL, JSON, CONFIG, SPECIAL, "added_tokens.json", *CHAT)


class Tokenizer:
    """A tokenizer read from a directory. Ids below `vocab_size`; see the module docstring.

    Attributes:
      directory: where it was read from.
      vocab_size: number of ids, added tokens included.
      bos_id, eos_id, unk_id, pad_id: special ids; None where the tokenizer has none.
      added_tokens: content -> id of every token that is not in the trained vocabulary.
      fingerprint: SHA-256 (hex) of everything that decides ids; equal for equal tokenizers,
        whether or not the Hugging Face files have been written beside the model.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        config = _read_json(self.directory / CONFIG)
        special = _read_json(self.directory / SPECIAL)
        added = {}
        if (self.directory / MODEL).is_file():
            self._engine = _SentencePieceEngine(self.directory / MODEL)
            # transformers 5 lists added tokens in tokenizer.json alone.
            spec = _read_json(self.directory / JSON)
            added = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
        elif (self.directory / JSON).is_file():
            self._engine = _JsonEngine(self.directory / JSON)
        else:
            raise ConfigError(
                [
                    f"tokenizer directory {str(directory)!r} holds neither {MODEL} nor {JSON}: "
                    "give a directory that `lemur data tokenizer` wrote, or a Hugging Face one"
                ]
            )
        declared = added | self._engine.added
        for index, token in (config.get("added_tokens_decoder") or {}).items():
            declared[token["content"]] = int(index)
        declared |= _read_json(self.directory / "added_tokens.json")
        inside = self._engine.size
        self.added_tokens = {
            content: index
            for content, index in sorted(declared.items(), key=lambda item: item[1])
            if index >= inside
        }
        self.vocab_size = max([inside - 1, *self.added_tokens.values()]) + 1
        self._declared = declared
        self.bos_id = self._special("bos", config, special)
        self.eos_id = self._special("eos", config, special)
        self.unk_id = self._special("unk", config, special)
        self.pad_id = self._special("pad", config, special)
        identity = [self._engine.digest, self.added_tokens, self.bos_id, self.eos_id]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads a tokenizer directory. Raises ConfigError when there is none or it is damaged."""
        return cls(directory)

    def _special(self, role: str, config: dict, special: dict) -> int | None:
        stated = config.get(f"{role}_token", special.get(f"{role}_token"))
        content = stated["content"] if isinstance(stated, dict) else stated
        if content is None:
            return self._engine.specials.get(role)
        index = self._declared.get(content)
        index = self._engine.id_of(content) if index is None else index
        if index is None:
            raise ConfigError(
                [
                    f"{self.directory / CONFIG}: {role}_token={content!r} is not in the "
                    "vocabulary: add it to added_tokens_decoder or correct the name"
                ]
            )
        return index

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, which is data: special tokens spelled in it stay text."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False, threads: int = 1
    ) -> list[list[int]]:
        """Ids of each text, on native threads (measured 3.9 MB/s on one, 11.1 MB/s on four)."""
        before = [self._required("bos")] if bos else []
        after = [self._required("eos")] if eos else []
        batch = self._engine.encode_batch(texts, threads)
        return [before + ids + after for ids in batch] if bos or eos else batch

    def encode_arrays(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False, threads: int = 1
    ) -> list[np.ndarray]:
        """As `encode_batch`, in arrays [n] int32: what a build packs; `words.py` where it can."""
        before = [self._required("bos")] if bos else []
        after = [self._required("eos")] if eos else []
        if (words := self._engine.words) is not None:
            found = [words.encode(text) for text in texts]
        else:
            found = self._engine.encode_batch(texts, threads)
        return [np.concatenate([before, ids, after]).astype(np.int32) for ids in found]

    def _required(self, role: str) -> int:
        index = getattr(self, f"{role}_id")
        if index is None:
            raise ConfigError(
                [
                    f"{role}_token=None in the tokenizer of {str(self.directory)!r}: "
                    f"name one in {CONFIG}"
                ]
            )
        return index

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special ids are silent; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(int(index)) for index in ids]) + stream.flush()

    def stream(self, after: Iterable[int] = ()) -> "TextStream":
        """A decoder that takes one id at a time; `after` are the ids that came before it."""
        return TextStream(self._bytes, self._engine.drops_first_space, after)

    def piece(self, index: int) -> str:
        """The name of an id as the vocabulary spells it, for people: '▁def', '<0x0A>', '</s>'."""
        for content, added in self.added_tokens.items():
            if added == index:
                return content
        return self._engine.piece(index)

    def id_of(self, content: str) -> int | None:
        """The id that is spelled exactly so in the vocabulary or the added tokens, or None."""
        index = self._declared.get(content)
        return self._engine.id_of(content) if index is None else index

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        # Special and added tokens make no text: whoever wants their names asks `piece`.
        table = self._engine.byte_table()
        table += [b""] * (self.vocab_size - len(table))
        for index in self._declared.values():
            table[index] = b""
        return table

    @property
    def adds_first_space(self) -> bool:
        """Whether a space is written in front of every text (SentencePiece's dummy prefix)."""
        return self._engine.drops_first_space

    def files(self) -> dict[str, bytes]:
        """Name -> content of the tokenizer's files: another directory with them is the same one."""
        paths = [self.directory / name for name in FILES]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}

    def save(self, directory: str | Path) -> None:
        """Copies the tokenizer's files; the copy has the same fingerprint."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (directory / name).write_bytes(data)


class TextStream:
    """Decodes ids one by one. What `push` returned, joined, is always whole characters.

    An unfinished UTF-8 sequence is held back until its last byte arrives; `flush` ends it.
    SentencePiece writes a space in front of a text: the first text of all loses one.
    """

    def __init__(self, table: list[bytes], drops_first_space: bool, after: Iterable[int]):
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = drops_first_space and not any(table[index] for index in after)

    def push(self, index: int) -> str:
        """The text that this id completes; "" while a character is unfinished."""
        if not 0 <= index < len(self._table):
            raise ValueError(
                f"token id {index} is outside of the vocabulary [0, {len(self._table)})"
            )
        data = self._table[index]
        if data and self._at_start:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD for an unfinished character, "" otherwise; the stream can go on after it."""
        return self._decoder.decode(b"", final=True)


class _SentencePieceEngine:
    """`tokenizer.model`: text is data by construction, control pieces never match text."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ConfigError(
                [
                    f"{path} is not a SentencePiece model ({error}): copy it again, or, if it is "
                    "Llama 3's tiktoken file, use the directory with tokenizer.json"
                ]
            ) from error
        processor = self._processor
        self.size = processor.vocab_size()
        self.digest = hashlib.sha256(data).hexdigest()
        self.added: dict[str, int] = {}
        roles = {"bos": processor.bos_id(), "eos": processor.eos_id()}
        roles |= {"unk": processor.unk_id(), "pad": processor.pad_id()}
        self.specials = {role: index for role, index in roles.items() if index >= 0}
        probe = processor.encode("a", out_type=str)
        self.drops_first_space = bool(probe) and probe[0].startswith(SPACE)

    @functools.cached_property
    def words(self) -> WordEncoder | None:
        data = self._processor.serialized_model_proto()
        return WordEncoder(data) if is_separable(data) else None

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=threads)

    def piece(self, index: int) -> str:
        return self._processor.id_to_piece(index)

    def id_of(self, content: str) -> int | None:
        index = self._processor.piece_to_id(content)
        return index if self._processor.id_to_piece(index) == content else None

    def byte_table(self) -> list[bytes]:
        p, table = self._processor, []
        for index in range(self.size):
            if p.is_byte(index):
                table.append(bytes([int(p.id_to_piece(index)[1:-1], 16)]))
            elif p.is_control(index):
                table.append(b"")
            elif p.is_unknown(index):
                table.append(" ⁇ ".encode())
            else:
                table.append(p.id_to_piece(index).replace(SPACE, " ").encode())
        return table


class _JsonEngine:
    """`tokenizer.json` through the `tokenizers` library, with its parsing of specials removed."""

    words = None  # another algorithm

    def __init__(self, path: Path):
        import tokenizers  # not needed by SentencePiece tokenizers

        spec = _read_json(path)
        self.added = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
        self.digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        self._byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))
        if not self._byte_level and '"ByteFallback"' not in json.dumps(spec.get("decoder")):
            raise ConfigError(
                [
                    f"{path}: decoder={(spec.get('decoder') or {}).get('type')!r} is not known; "
                    "legal: ByteLevel (Llama 3, GPT-2) or ByteFallback (Llama 2)"
                ]
            )
        self.drops_first_space = '"Strip"' in json.dumps(spec.get("decoder"))
        # Without added tokens nothing in a text is special; without post-processor no ids appear.
        plain = spec | {"added_tokens": [], "post_processor": None, "truncation": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain | {"padding": None}))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError([f"{path} is not a tokenizer ({error}): copy it again"]) from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        self.size = max(vocabulary.values()) + 1
        self.specials: dict[str, int] = {}

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        del threads  # the library uses every core, or RAYON_NUM_THREADS
        batch = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def piece(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or f"<id {index}>"

    def id_of(self, content: str) -> int | None:
        return self._tokenizer.token_to_id(content)

    def byte_table(self) -> list[bytes]:
        pieces = [self._tokenizer.id_to_token(index) or "" for index in range(self.size)]
        if self._byte_level:
            letters = _byte_level_alphabet()
            return [bytes(letters[c] for c in piece if c in letters) for piece in pieces]
        return [
            bytes([int(piece[3:5], 16)])
            if len(piece) == 6 and piece.startswith("<0x")
            else piece.replace(SPACE, " ").encode()
            for piece in pieces
        ]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable letter for each byte: printable Latin-1 stands for itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in set(printable)]
    return letters | {chr(256 + n): value for n, value in enumerate(others)}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError([f"{path} is not JSON ({error}): copy it again or remove it"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path} holds a {type(content).__name__}: it must be a JSON object"])
    return content
