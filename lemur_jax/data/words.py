"""SentencePiece BPE, word by word and remembered: the same ids, several times faster.

BPE merges neighbours into pieces of the vocabulary and nothing else. So where no piece has the
characters `a b` side by side, nothing ever merges across that border, and the text on either side
may be encoded alone. SentencePiece keeps scripts, digits and spaces apart when it is trained: in
Llama's vocabulary no piece goes from a letter to "▁" (a space), to an ASCII sign or to a digit, and
none has a newline. A text falls into words, signs and numbers, each with the spaces before it.
These repeat, so most ids come out of a dictionary. `is_separable` checks a model for all of this;
`tests/data/test_words.py` compares with SentencePiece itself.
"""

import re

import numpy as np
import sentencepiece

SPACE = "▁"
CHARACTERS_PER_WORD = 48  # longer ones rarely come again
WORDS = 400_000  # remembered: some 80 MB; then the memory starts anew
_LETTER, _DIGIT, _OTHER = "A-Za-z", "0-9", "\u0080-\u2580\u2582-\U0010ffff"  # but SPACE
_SIGN = r"\x00-\x09\x0b-\x1f!-/:-@\[-`{-~\x7f"  # ASCII, but newline and space
_WORDS = re.compile(
    f"{SPACE}*(?:[{_LETTER}]++(?![{_OTHER}])|[{_SIGN}]++(?![{_OTHER}])|[{_DIGIT}]{{1,3}}"
    # Signs such as “ are in pieces with letters and with ASCII signs: they stay with both.
    f"|[{_LETTER}{_SIGN}{_OTHER}]+)|{SPACE}+|\n"
)
# What no piece may have inside, if those are to be the borders.
_BORDER = re.compile(
    f"[^{SPACE}]{SPACE}|[{_LETTER}][{_SIGN}]|[{_SIGN}][{_LETTER}]|[{_DIGIT}][^{SPACE}]"
    f"|[^{SPACE}][{_DIGIT}]|\n.|.\n",
    re.DOTALL,
)


def is_separable(model: bytes) -> bool:
    """Whether words of this serialised SentencePiece model may be encoded one by one."""
    from sentencepiece import sentencepiece_model_pb2 as proto  # imports protobuf

    spec = proto.ModelProto.FromString(model)
    normalizer, trainer = spec.normalizer_spec, spec.trainer_spec
    plain = (
        not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and not trainer.treat_whitespace_as_suffix
    )
    # Without byte fallback, neighbouring unknown characters become one <unk>, across borders too.
    is_bpe = trainer.model_type == proto.TrainerSpec.BPE and trainer.byte_fallback
    texts = (p.piece for p in spec.pieces if p.type in (p.NORMAL, p.USER_DEFINED, p.UNUSED))
    return plain and is_bpe and not any(map(_BORDER.search, texts))


class WordEncoder:
    """Encodes texts with a separable model (see `is_separable`); one thread."""

    def __init__(self, model: bytes):
        from sentencepiece import sentencepiece_model_pb2 as proto

        # A text has a space put before it, if the model says so; a word inside of one has not.
        spec = proto.ModelProto.FromString(model)
        self._first = SPACE if spec.normalizer_spec.add_dummy_prefix else ""
        spec.normalizer_spec.add_dummy_prefix = False
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        (self._newline,) = self._processor.encode("\n")
        self._forget()

    def _forget(self) -> None:
        # Word -> its ids as int32.
        self._memory = {"\n": np.array([self._newline], np.int32).tobytes()}

    def encode(self, text: str) -> np.ndarray:
        """Ids [n] int32 of `text`, those of SentencePieceProcessor.encode."""
        if not text:
            return np.zeros(0, np.int32)
        if len(self._memory) > WORDS:
            self._forget()
        words = _WORDS.findall(self._first + text.replace(" ", SPACE))
        new = list(set(words).difference(self._memory))
        if new:
            self._learn(new)
        ids = np.frombuffer(b"".join(map(self._memory.__getitem__, words)), np.int32)
        for word in new:
            if len(word) > CHARACTERS_PER_WORD:
                del self._memory[word]
        return ids

    def _learn(self, new: list[str]) -> None:
        # One call for all: nothing merges across a newline, so its id is where each word ends.
        ids = np.array(self._processor.encode("\n".join(new)), np.int32)
        data, start = ids.tobytes(), 0
        ends = [*(np.flatnonzero(ids == self._newline) * ids.itemsize).tolist(), len(data)]
        for word, end in zip(new, ends, strict=True):
            self._memory[word] = data[start:end]
            start = end + ids.itemsize
