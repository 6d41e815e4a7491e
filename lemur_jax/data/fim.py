"""Fill-in-the-middle: a document becomes prefix, suffix, middle (arXiv:2207.14255).

    PSM  BOS <PRE> prefix <SUF> suffix <MID> middle EOS
    SPM  BOS <PRE> <SUF> suffix <MID> prefix middle EOS    (the paper's variant 2, section 3)

Documents are cut at two characters drawn uniformly, before they are packed (the paper's
"document level"). What happens to a document depends on its text and the seed only: not on the
order of documents, nor on who builds. EOS is the paper's <EOT>: where the model learns to stop.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.data.tokenizer import Tokenizer

_PROBE = "\n"  # nothing merges with what follows a newline in a SentencePiece vocabulary


class Cut(NamedTuple):
    """How a text is rearranged: text[:first], text[first:second], text[second:]; SPM or PSM."""

    first: int
    second: int
    spm: bool


def draw(text: str, seed: int, rate: float, spm_rate: float) -> Cut | None:
    """Where `text` is cut; None (with probability 1 - `rate`) leaves it as it is."""
    digest = hashlib.sha256(f"{seed} fim {text}".encode()).digest()
    a, b, c, d = (int.from_bytes(digest[n : n + 8], "big") / 2**64 for n in (0, 8, 16, 24))
    if a >= rate:
        return None
    places = sorted((int(c * (len(text) + 1)), int(d * (len(text) + 1))))
    return Cut(*places, spm=b < spm_rate)


class FillInTheMiddle:
    """Rearranges and tokenises documents.

    Args:
      tokenizer: must know the three `tokens`.
      tokens: spelling of <PRE>, <SUF>, <MID>, in this order.

    Raises ConfigError when a token is unknown or split by the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[str]):
        ids = [tokenizer.id_of(token) for token in tokens]
        unknown = [token for token, index in zip(tokens, ids) if index is None]
        if unknown:
            raise ConfigError(
                [
                    f"BuildConfig.fim_tokens: the tokenizer {str(tokenizer.directory)!r} has no "
                    f"{', '.join(map(repr, unknown))}; add them to its tokenizer_config.json "
                    "(added_tokens_decoder), or name the ones that it has"
                ]
            )
        self._tokenizer = tokenizer
        self._prefix, self._suffix, self._middle = ids
        # SentencePiece writes a space in front of every text; these go on in the middle of one.
        probe = tokenizer.encode(_PROBE) if tokenizer.adds_first_space else []
        self._before, self._probe = (_PROBE if probe else ""), probe

    def encode(self, text: str, cut: Cut) -> np.ndarray:
        """Ids of the rearranged text, with the special ids, without BOS and EOS."""
        middle, suffix = text[cut.first : cut.second], text[cut.second :]
        parts = [text[: cut.first], self._before + middle, self._before + suffix]
        prefix_ids, middle_ids, suffix_ids = self._tokenizer.encode_arrays(parts)
        middle_ids, suffix_ids = self._without_probe(middle_ids), self._without_probe(suffix_ids)
        pre, suf, mid = [self._prefix], [self._suffix], [self._middle]
        if cut.spm:
            order = pre, suf, suffix_ids, mid, prefix_ids, middle_ids
        else:
            order = pre, prefix_ids, suf, suffix_ids, mid, middle_ids
        return np.concatenate(order).astype(np.int32)

    def _without_probe(self, ids: np.ndarray) -> np.ndarray:
        if ids[: len(self._probe)].tolist() != self._probe:
            raise ConfigError(
                [
                    "BuildConfig.fim_rate: this tokenizer merges a newline with what follows it, "
                    "so a text cannot be cut exactly; set fim_rate=0, or use another tokenizer"
                ]
            )
        return ids[len(self._probe) :]
