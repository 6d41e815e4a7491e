"""A tiny model with confident logits, and a tokenizer whose every id is one character."""

from lemur_jax.config import ModelConfig, RopeConfig

VOCAB, CONTEXT = 101, 96


class Letters:
    """ids 3.. are the characters "!".."~"; bos 1, eos 2. Encodes any text, modulo its alphabet."""

    vocab_size, bos_id, eos_id = VOCAB, 1, 2

    def encode(self, text, bos=False):
        return [self.bos_id] * bos + [3 + (ord(c) - 33) % 94 for c in text]

    def stream(self, after=()):
        return self

    def push(self, index):
        return chr(33 + index - 3) if index >= 3 else ""

    def flush(self):
        return ""


def config(**changes):
    return ModelConfig(
        **{
            "vocab_size": VOCAB,
            "embed": 32,
            "mlp": 48,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "max_positions": CONTEXT,
            "rope": RopeConfig(theta=10000.0),
            "norm_eps": 1e-5,
            "dtype": "float32",
            # Random logits of 0.02-weights are all alike; these have clear favourites.
            "initializer_range": 0.3,
            "attention": "reference",
            **changes,
        }
    )
