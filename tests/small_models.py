"""Models of the tests: small, with grouped queries, float32 so that numbers can be compared."""

from lemur_jax.config import ModelConfig, RopeConfig

# Of the ids that no tokenizer made: 101, a prime, is padded to 128.
MODEL = ModelConfig(
    vocab_size=101,
    embed=32,
    mlp=64,
    layers=2,
    heads=8,
    kv_heads=2,
    head_dim=8,
    max_positions=64,
    rope=RopeConfig(theta=10000.0),
    norm_eps=1e-5,
    dtype="float32",
    attention="chunked",
)
# Of the data set `tiny_data`, whose tokenizer has 512 pieces.
RUN_MODEL = ModelConfig(
    vocab_size=512,
    embed=32,
    mlp=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=64,
    rope=RopeConfig(theta=10000.0),
    norm_eps=1e-5,
    dtype="float32",
)
