"""The sampler against the whole forward pass, against transformers, and against its promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import CONTEXT, VOCAB, Letters, config

from lemur_jax.config import ConfigError
from lemur_jax.model.decoder import Decoder
from lemur_jax.sample import buckets, rows
from lemur_jax.sample.request import Request
from lemur_jax.sample.sampler import CHUNK, Sampler

# float32, two layers, logits of size 10: sums in another order differ by a few 1e-6.
LOGPROB_TOLERANCE = 1e-4


def _texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(40, 120, rng.integers(2, 14)))) for _ in range(count)]


# ---------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------


def test_prefill_and_decode_equal_the_whole_forward_pass(sampler, model):
    """Red if `decode` feeds position + 1, or prefill takes the bucket's last state."""
    requests = [Request(prompt=text, max_new_tokens=20, logprobs=True) for text in _texts(3)]
    for request, done in zip(requests, sampler.generate(requests)):
        prompt = sampler.tokenizer.encode(request.prompt, bos=True)
        tokens = np.array([prompt + list(done.ids)])
        positions = np.arange(tokens.shape[1])[None]
        logits, _ = model(jnp.array(tokens), jnp.array(positions), jnp.ones_like(tokens))
        logprobs = np.asarray(jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1]))
        assert done.ids == tuple(logprobs.argmax(-1))
        want = logprobs[np.arange(len(done.ids)), done.ids]
        np.testing.assert_allclose(done.logprobs, want, atol=LOGPROB_TOLERANCE)


def test_greedy_equals_transformers(sampler, model):
    """Red if rows of a ragged batch share one length, or EOS is not a stop id."""
    torch = pytest.importorskip("torch")
    import transformers

    from lemur_jax.convert import tables
    from lemur_jax.model import param

    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.embed, intermediate_size=c.mlp,
            num_hidden_layers=c.layers, num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.max_positions, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    leaves, state = param.flatten(model), {}
    for rule in tables.hf_llama(c):
        array = np.asarray(leaves[rule.ours])
        for layer, name in enumerate(rule.source_names(c)):
            tensor = rule.to_theirs(array[layer] if rule.stacked else array, c)
            state[name] = torch.from_numpy(np.array(tensor))
    theirs.load_state_dict(state)

    requests = [Request(prompt=text, max_new_tokens=33) for text in _texts(6, seed=3)]
    for request, done in zip(requests, sampler.generate(requests)):
        ids = torch.tensor([sampler.tokenizer.encode(request.prompt, bos=True)])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=33, do_sample=False
        )
        want = out[0, ids.shape[1] :].tolist()
        stopped = want[-1] == 2
        assert list(done.ids) == (want[:-1] if stopped else want)
        assert done.finish_reason == ("stop" if stopped else "length")


def test_repetition_penalty_counts_prompt_and_new_tokens(sampler):
    """Red if `seen_BV` is not updated in `_draw`."""
    penalty = 1e6  # a token that occurred cannot come again
    request = Request(prompt="ABC", max_new_tokens=33, repetition_penalty=penalty)
    (done,) = sampler.generate([request])
    prompt = sampler.tokenizer.encode("ABC", bos=True)
    assert len(set(done.ids) | set(prompt)) == len(done.ids) + len(prompt)


def test_padding_has_not_occurred(sampler):
    """Red if `.max(real_BP)` in prefill becomes `.set(True)`: token 0 would be penalised."""
    request = Request(prompt="AB", max_new_tokens=20)
    ((lengths, row),) = sampler._rows([request])
    tokens_BP, lengths_B = rows.prompts([row], 1, lengths.prompt)
    state, drawn = sampler._prefill(
        sampler._weights, tokens_BP, lengths_B, rows.constants([row], 1), np.bool_(False)
    )
    (occurred,) = np.asarray(state.seen_BV)
    assert set(np.flatnonzero(occurred)) == {*row.prompt, int(drawn.tokens[0, 0])}


# ---------------------------------------------------------------------------------------------
# A row's output never depends on its batch-mates
# ---------------------------------------------------------------------------------------------

MIXED = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "top_k": 5, "seed": 6},
    {"temperature": 1.2, "top_p": 0.7, "seed": 7},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.3, "seed": 8},
    {"repetition_penalty": 1.5},
    {"max_new_tokens": 18},
    {"temperature": 1.0, "stop": ("a", "7"), "seed": 9},
]


def _mixed():
    return [
        Request(**{"prompt": text, "max_new_tokens": 24, **fields})
        for text, fields in zip(_texts(8, seed=1), MIXED)
    ]


def _answers(sampler, requests):
    return [dataclasses.replace(done, request=0) for done in sampler.generate(requests)]


def test_alone_or_in_any_batch(sampler):
    """Red if keys are folded with the row's number in the batch, or one row's `done` stops all."""
    requests = _mixed()
    together = _answers(sampler, requests)
    alone = [_answers(sampler, [request])[0] for request in requests]
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = _answers(sampler, [requests[i] for i in order])
    longer = Request(prompt="z" * 14, max_new_tokens=33, temperature=1.0)
    with_longer = _answers(sampler, [longer, *requests[:3], longer, longer])
    assert together == alone
    assert [together[i] for i in order] == shuffled
    assert with_longer[1:4] == together[:3]


def test_one_batch_size_is_exact(model):
    """Red if one batch bucket were not one program: log-probabilities agree in every bit."""
    exact = Sampler(model, Letters(), batches=(8,))
    requests = [dataclasses.replace(request, logprobs=True) for request in _mixed()]
    together = _answers(exact, requests)
    assert [_answers(exact, [request])[0] for request in requests] == together
    assert _answers(exact, requests[::-1]) == together[::-1]


def test_seeds_and_samples(sampler):
    """Red if `_key` ignores the seed, the sample or the token's index."""
    request = Request(prompt="once", max_new_tokens=30, temperature=1.0, n=4, seed=3)
    first, again = sampler.generate([request]), sampler.generate([request])
    assert first == again and [done.sample for done in first] == [0, 1, 2, 3]
    assert len({done.ids for done in first}) == 4
    other = sampler.generate([dataclasses.replace(request, seed=4)])
    assert not {done.ids for done in first} & {done.ids for done in other}
    # The first sample does not depend on how many there are.
    (single,) = sampler.generate([dataclasses.replace(request, n=1)])
    assert single == first[0]


# ---------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------


class _Compilations:
    """Counts everything that JAX compiles, eager operations included."""

    def __init__(self):
        self.count = 0

    def __call__(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    counter = _Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


def test_second_prompt_compiles_nothing(model, compiled):
    """Red if `steps` is static, a number of the method is static, or a batch is built with jnp."""
    sampler = Sampler(model, Letters())
    compiled.count = 0
    sampler.generate([Request(prompt="abc", max_new_tokens=20)])
    assert compiled.count == 3
    assert sampler.compilations == {
        ("prefill", 1, 16): 1,
        ("lengthen", 1, 16, 48): 1,
        ("decode", 1, 48): 1,
    }
    sampler.generate([Request(prompt="another one", max_new_tokens=25)])
    warm = dict(temperature=0.5, top_p=0.9, top_k=9, min_p=0.1, repetition_penalty=1.1)
    sampler.generate([Request(prompt="x", max_new_tokens=20, stop=["q"], logprobs=True, **warm)])
    list(sampler.stream(Request(prompt="", max_new_tokens=18, temperature=0.3, stop_ids=[7, 9])))
    assert compiled.count == 3 and sampler.compilations.total() == 3


def test_rows_of_a_length_find_each_other():
    """Red if `groups` does not sort, cuts too late, or forgets the order of arrival."""
    short, long = buckets.Lengths(16, 48), buckets.Lengths(32, 48)
    arrivals = [(short, 0), (long, 1), (short, 2), (long, 3), (short, 4)]
    assert list(buckets.groups(arrivals, 2)) == [(short, [0, 2]), (short, [4]), (long, [1, 3])]


def test_buckets():
    """Red if a bucket is too small for its length, or a cache lacks room for the new tokens."""
    for length in range(1, 3000):
        bucket = buckets.length_bucket(length)
        assert length <= bucket and (bucket <= 16 or bucket <= 1.5 * length)
    lengths = buckets.lengths_of(64, 128, 4096)
    assert (lengths.prompt, lengths.cache) == (64, 192)
    assert buckets.lengths_of(90, 1, 96) == buckets.Lengths(96, 96)
    assert [buckets.batch_bucket(n, (1, 2, 4)) for n in (1, 2, 3, 4)] == [1, 2, 4, 4]


# ---------------------------------------------------------------------------------------------
# Ends, streams
# ---------------------------------------------------------------------------------------------


def _plain(sampler, **fields):
    (done,) = sampler.generate([Request(prompt="story", max_new_tokens=33, **fields)])
    return done


def test_stop_string_cuts_the_text(sampler):
    """Red if the text is cut after the stop string."""
    whole = _plain(sampler, temperature=1.0)
    stop = whole.text[20:23]
    done = _plain(sampler, temperature=1.0, stop=("never-there", stop))
    assert done.text == whole.text[: whole.text.index(stop)]
    assert (done.finish_reason, done.stopped_by) == ("stop", stop)
    assert done.ids == whole.ids[: len(done.ids)]


def test_stop_id_ends_the_row(sampler):
    """Red if the stop id is returned among the ids, or is not given to the device."""
    whole = _plain(sampler, temperature=1.0)
    stop = whole.ids[10]
    done = _plain(sampler, temperature=1.0, stop_ids=(100, stop))
    assert done.ids == whole.ids[: whole.ids.index(stop)]
    assert (done.finish_reason, done.stopped_by) == ("stop", stop)


def test_eos_ends_and_can_be_ignored(sampler, monkeypatch):
    """Red if ignore_eos is not read."""
    (whole,) = sampler.generate([Request(prompt="q", max_new_tokens=20)])
    monkeypatch.setattr(sampler, "stop_ids", (whole.ids[4],))
    first = whole.ids.index(whole.ids[4])
    (cut,) = sampler.generate([Request(prompt="q", max_new_tokens=20)])
    assert (cut.ids, cut.finish_reason) == (whole.ids[:first], "stop")
    (ignoring,) = sampler.generate([Request(prompt="q", max_new_tokens=20, ignore_eos=True)])
    assert (ignoring.ids, ignoring.finish_reason) == (whole.ids, "length")


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stop": ("k", "Zq", "5")}, {"held": 1}], ids=str)
def test_stream_joined_is_the_text(sampler, fields):
    """Red if `take` drops what `finish` returns, or streams after a stop string."""
    request = Request(prompt="tell", max_new_tokens=33, temperature=1.0)
    if "held" in fields:  # the end of the text might become a stop string, until it has ended
        (whole,) = sampler.generate([request])
        fields = {"stop": (whole.text[-2:] + "never",)}
    request = dataclasses.replace(request, **fields)
    text, finished = {}, {}
    for piece in sampler.stream(request):
        assert piece.sample not in finished
        text[piece.sample] = text.get(piece.sample, "") + piece.text
        if piece.completion is not None:
            finished[piece.sample] = piece.completion
    want = sampler.generate([request])
    assert [finished[n] for n in sorted(finished)] == want
    assert [text[n] for n in sorted(text)] == [done.text for done in want]


def test_stream_arrives_in_pieces(sampler):
    """Red if the stream runs in chunks of generate's size."""
    pieces = list(sampler.stream(Request(prompt="tell", max_new_tokens=CHUNK)))
    assert len(pieces) >= CHUNK // 4


# ---------------------------------------------------------------------------------------------
# Limits and errors
# ---------------------------------------------------------------------------------------------


def test_empty_prompt_is_bos(sampler):
    """Red if an empty prompt is padded instead."""
    one, two = sampler.generate(
        [Request(prompt="", max_new_tokens=20), Request(prompt=[1], max_new_tokens=20)]
    )
    assert one.ids == two.ids and one.prompt_tokens == 1


def test_context_cuts_new_tokens(sampler):
    """Red if positions run past max_positions."""
    prompt = "x" * (CONTEXT - 11)  # and BOS
    (done,) = sampler.generate([Request(prompt=prompt, max_new_tokens=50, temperature=1.0)])
    assert len(done.ids) == 10 and done.finish_reason == "length"
    assert "max_new_tokens=50 was cut to 10" in done.note and str(CONTEXT) in done.note


def test_prompt_longer_than_the_context(sampler):
    """Red if a prompt is silently truncated; also red if only the first request is named."""
    with pytest.raises(ConfigError) as error:
        sampler.generate(
            [
                Request(prompt="x" * (CONTEXT - 1)),
                Request(prompt="ok"),
                Request(prompt=[VOCAB + 4]),
            ]
        )
    first, second = error.value.problems
    assert f"request 0: prompt has {CONTEXT} tokens" in first and "by 1 tokens or more" in first
    assert f"request 2: prompt holds token id {VOCAB + 4}" in second and str(VOCAB) in second


@pytest.mark.parametrize("size, words", [(VOCAB + 1, "larger"), (20, "much smaller")])
def test_tokenizer_of_another_model(size, words):
    """Red if the vocabulary is not compared; both numbers must be in the message."""
    big = config(vocab_size=2000 if size == 20 else VOCAB)
    other = Decoder(big, jax.random.key(0))

    class Other(Letters):
        vocab_size = size

    with pytest.raises(ConfigError, match=f"vocab_size={size} is {words}.*{big.vocab_size}"):
        Sampler(other, Other())


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"n": 2}, "n=2 with temperature=0"),
        ({"n": 0}, "n=0 must be an integer >= 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": "abc"}, "stop='abc' must be a list"),
        ({"prompt": 5}, "prompt must be a string"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"temperature": -1, "top_p": 0.0}, "temperature=-1"),
        ({"temperature": None}, "temperature=None"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"logprobs": 1}, "logprobs=1"),
    ],
    ids=str,
)
def test_bad_requests(fields, words):
    """Red if a check of Request is removed."""
    with pytest.raises(ConfigError) as error:
        Request(**{"prompt": "x", **fields})
    assert words in str(error.value)


def test_batches_must_ascend(model):
    """Red if the order of batch sizes is not checked: the largest is taken as the last."""
    with pytest.raises(ConfigError, match=r"batches=\(4, 2\)"):
        Sampler(model, Letters(), batches=(4, 2))


def test_bfloat16_weights(model):
    """Red if norm scales are cast too, or a matrix is left in float32."""
    low = Sampler(model, Letters(), dtype="bfloat16")
    assert low.model.layers[0].wq[...].dtype == jnp.bfloat16
    assert low.model.layers[0].mlp_norm[...].dtype == jnp.float32
    (done,) = low.generate([Request(prompt="abc", max_new_tokens=1)])
    assert len(done.ids) == 1
