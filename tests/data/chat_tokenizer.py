"""A small tokenizer with ChatML's tokens, for the chat tests; a second, without."""

import json
from pathlib import Path

from lemur_jax.convert.vocabulary import CHATML
from lemur_jax.data import tokenizer_files
from lemur_jax.data.tokenizer import Tokenizer


def make(directory: Path, added: tuple[str, ...] = (*CHATML, "<|end_of_conv|>")) -> Tokenizer:
    """600 pieces learnt from three modules of the standard library."""
    library = Path(json.__file__).parent.parent
    texts = [(library / name).read_text() for name in ("argparse.py", "ast.py", "inspect.py")]
    plain = tokenizer_files.train(texts, directory, vocab_size=600)
    if added:
        ids = {token: plain.vocab_size + n for n, token in enumerate(added)}
        (directory / "added_tokens.json").write_text(json.dumps(ids))
        tokenizer_files.write_hf_files(directory)
    return Tokenizer.load(directory)
