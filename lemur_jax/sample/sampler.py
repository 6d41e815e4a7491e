"""The offline sampler: requests in, completions out, all at once or as a stream.

Requests become rows (one for each sample), rows of equal length buckets become batches, and each
batch runs prefill once and then chunks of decode steps. One chunk is always in flight while the
tokens of the one before are turned into text. See `buckets` for what is compiled when.
"""

import collections
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.model.decoder import Decoder
from lemur_jax.sample import buckets, loop, weights
from lemur_jax.sample.request import Completion, Piece, Request
from lemur_jax.sample.rows import Progress, Row, Tokenizer, constants, prompts

# Most tokens of a chunk: how long a batch runs on after its last row has met a stop string.
CHUNK = 32
# Tokens of a chunk while streaming: what a reader sees arrive together.
STREAM_CHUNK = 4
# Models pad their vocabulary: Phi-2 has 905 rows more than its tokenizer has tokens. Above this it
# is another model's tokenizer.
MOST_UNNAMED_ROWS = 1024


class Sampler:
    """Continues prompts with a model. Not thread-safe.

    What is guaranteed: a row's program and inputs depend on its own request, on the weights and on
    the batch bucket; nothing of a batch-mate enters its arithmetic. Two batch buckets are two
    programs, whose float32 matrix products may differ in their last bits: a token differs only
    where two candidates are that close. With a single batch size (`batches=(8,)`) every row always
    runs in the same program, and its tokens and log-probabilities do not depend on its batch-mates
    in any bit (tested on CPU; more than 8 stop ids in a batch are a wider array, another program).

    Attributes:
      model: decoder with unstacked layers, in the dtype that it computes in.
      tokenizer: text to ids and back.
      stop_ids: tokens that end every text, unless a request ignores EOS.
      compilations: how often each program was compiled: ("prefill", batch, prompt bucket),
        ("lengthen", batch, prompt bucket, cache bucket), ("decode", batch, cache bucket) -> count.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        dtype: str | None = None,
        stop_ids: Sequence[int] = (),
        batches: Sequence[int] = buckets.BATCHES,
    ):
        """Takes a model in memory; `Sampler.load` reads one from a path.

        Args:
          model: layers stacked or not; not changed.
          tokenizer: its vocabulary must fit the model's.
          dtype: to compute in; `model.config.dtype` when None.
          stop_ids: tokens that end every text, besides the tokenizer's EOS.
          batches: batch sizes that may be compiled, ascending.

        Raises:
          ConfigError: the tokenizer does not fit the model, or batches are not ascending positive
            integers.
        """
        self.batches = tuple(batches)
        if not self.batches or list(self.batches) != sorted({max(1, b) for b in self.batches}):
            raise ConfigError([f"batches={self.batches} must be ascending positive integers"])
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = weights.for_sampling(model, dtype), tokenizer
        ends = (tokenizer.eos_id, *stop_ids)
        self.stop_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        self.compilations: collections.Counter[tuple] = collections.Counter()
        # Flattening the module at every call costs more than a small model's decode step.
        self._weights, structure = jax.tree.flatten(self.model)
        self._prefill = jax.jit(functools.partial(self._traced_prefill, structure))
        self._lengthen = jax.jit(self._traced_lengthen, static_argnames="slots")
        self._decode = jax.jit(functools.partial(self._traced_decode, structure), donate_argnums=1)

    @classmethod
    def load(cls, path: str, dtype: str | None = None, **options) -> "Sampler":
        """Reads a run directory, a checkpoint or a Hugging Face directory.

        Args:
          path: recognised by what it contains.
          dtype: to compute in; the model's own compute dtype when None.
          **options: of `Sampler`.

        Raises:
          ConfigError: the tokenizer is missing or does not match the model.
          ConversionError, CheckpointError: the path holds no model, or a damaged one.
        """
        from lemur_jax.sample.load import load  # checkpoints and converters load late

        found = load(path)
        return cls(found.model, found.tokenizer, dtype=dtype, stop_ids=found.stop_ids, **options)

    # -----------------------------------------------------------------------------------------
    # Programs. Their Python bodies run once for each compilation, which is what is counted.
    # -----------------------------------------------------------------------------------------

    def _traced_prefill(self, structure, leaves, tokens_BP, lengths_B, rows, want_logprobs):
        self.compilations[("prefill", *tokens_BP.shape)] += 1
        model = jax.tree.unflatten(structure, leaves)
        return loop.prefill(model, tokens_BP, lengths_B, rows, want_logprobs)

    def _traced_lengthen(self, state, slots):
        self.compilations[("lengthen", *state.cache.positions.shape, slots)] += 1
        return loop.lengthen(state, slots)

    def _traced_decode(self, structure, leaves, state, rows, stopped_B, steps, want_logprobs):
        self.compilations[("decode", *state.cache.positions.shape)] += 1
        row_alone = weights.OutputMajor.helps(self.model, state.token.shape[0])

        def read_model():
            whole = self._output_major.as_model_reads(leaves) if row_alone else leaves
            return jax.tree.unflatten(structure, whole)

        return loop.decode(read_model, state, rows, stopped_B, steps, want_logprobs, CHUNK)

    @functools.cached_property
    def _output_major(self) -> weights.OutputMajor:
        return weights.OutputMajor(self.model)

    def _decode_leaves(self, batch: int) -> list[jax.Array]:
        if weights.OutputMajor.helps(self.model, batch):
            return self._output_major.leaves
        return self._weights

    # -----------------------------------------------------------------------------------------
    # Requests
    # -----------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of all requests, in the order of the requests.

        Raises:
          ConfigError: a prompt that is longer than the context or holds unknown ids; every such
            request is named, and nothing is sampled.
        """
        rows = self._rows(requests)
        found = [
            piece.completion
            for lengths, group in buckets.groups(rows, self.batches[-1])
            for _, piece in self._run(lengths, group, CHUNK)
            if piece.completion is not None
        ]
        return sorted(found, key=lambda c: (c.request, c.sample))

    def stream(self, request: Request) -> Iterator[Piece]:
        """The text of a request as it is made; samples of n > 1 arrive interleaved."""
        for lengths, group in buckets.groups(self._rows([request]), self.batches[-1]):
            for _, piece in self._run(lengths, group, STREAM_CHUNK):
                yield piece

    def lengths(self, request: Request) -> buckets.Lengths:
        """The length buckets of a request's rows: what decides which requests share a batch.

        Raises:
          ConfigError: as in `generate`.
        """
        return self._rows([request])[0][0]

    def _rows(self, requests: Sequence[Request]) -> list[tuple[buckets.Lengths, Row]]:
        rows, problems = [], []
        for index, request in enumerate(requests):
            prompt = self._prompt(request)
            where = "" if len(requests) == 1 else f"request {index}: "
            wrong = [f"{where}{problem}" for problem in self._problems(request, prompt)]
            problems += wrong
            if wrong:
                continue
            context = self.model.config.max_positions
            limit, note = min(request.max_new_tokens, context - len(prompt)), None
            if limit < request.max_new_tokens:
                note = (
                    f"max_new_tokens={request.max_new_tokens} was cut to {limit}: the prompt has "
                    f"{len(prompt)} tokens and the model's context (max_positions) is {context}"
                )
            eos = () if request.ignore_eos else self.stop_ids
            stop_ids = tuple(dict.fromkeys((*eos, *request.stop_ids)))
            lengths = buckets.lengths_of(len(prompt), limit, context)
            rows += [
                (lengths, Row(request, index, sample, prompt, limit, stop_ids, note))
                for sample in range(request.n)
            ]
        if problems:
            raise ConfigError(problems)
        return rows

    def _prompt(self, request: Request) -> tuple[int, ...]:
        if isinstance(request.prompt, str):
            return tuple(self.tokenizer.encode(request.prompt, bos=True))
        return request.prompt or tuple(self.tokenizer.encode("", bos=True))

    def _problems(self, request: Request, prompt: tuple[int, ...]) -> list[str]:
        problems = []
        vocab, context = self.model.config.vocab_size, self.model.config.max_positions
        for field, ids in (("prompt", prompt), ("stop_ids", request.stop_ids)):
            unknown = [index for index in ids if not 0 <= index < vocab]
            if unknown:
                problems.append(
                    f"{field} holds token id {unknown[0]}, but the model's vocab_size is {vocab}: "
                    "give ids made by the model's own tokenizer"
                )
        if len(prompt) >= context:
            problems.append(
                f"prompt has {len(prompt)} tokens, but the model's context (max_positions) is "
                f"{context} and must hold at least one new token: shorten the prompt by "
                f"{len(prompt) - context + 1} tokens or more, or use a model with a longer context"
            )
        return problems

    # -----------------------------------------------------------------------------------------
    # One batch
    # -----------------------------------------------------------------------------------------

    def _run(
        self, lengths: buckets.Lengths, group: list[Row], chunk: int
    ) -> Iterator[tuple[Row, Piece]]:
        """Runs a batch to its end; yields text of any row as soon as it is certain."""
        batch = buckets.batch_bucket(len(group), self.batches)
        tokens_BP, lengths_B = prompts(group, batch, lengths.prompt)
        rows = constants(group, batch)
        want_logprobs = np.bool_(any(row.request.logprobs for row in group))
        state, drawn = self._prefill(self._weights, tokens_BP, lengths_B, rows, want_logprobs)
        if lengths.cache > lengths.prompt:
            state = self._lengthen(state, slots=lengths.cache)
        progress = [Progress(row, self.tokenizer) for row in group]
        decode_leaves = self._decode_leaves(batch)
        left = max(row.limit for row in group) - 1
        while True:
            # The next chunk is dispatched before this one's tokens are waited for.
            following, steps = None, min(chunk, left)
            if steps > 0:
                stopped_B = np.ones(batch, np.bool_)
                stopped_B[: len(group)] = [p.finished for p in progress]
                state, following = self._decode(
                    decode_leaves,
                    state,
                    rows,
                    stopped_B,
                    np.int32(steps),
                    want_logprobs,
                )
                left -= steps
            tokens_BC, logprobs_BC, count_B, done_B = jax.device_get(drawn)
            for p, tokens, logprobs, count, done in zip(
                progress, tokens_BC, logprobs_BC, count_B, done_B
            ):
                for piece in p.take(tokens[:count], logprobs[:count], bool(done)):
                    yield p.row, piece
            if following is None or all(p.finished for p in progress):
                return
            drawn = following


def check_vocabulary(model: Decoder, tokenizer: Tokenizer) -> None:
    """Raises ConfigError when the tokenizer cannot be the model's."""
    have, need = model.config.vocab_size, tokenizer.vocab_size
    fix = "use the tokenizer that the model was trained with"
    if need > have:
        raise ConfigError(
            [
                f"tokenizer.vocab_size={need} is larger than the model's vocab_size={have}: ids "
                f"{have} to {need - 1} have no embedding; {fix}, or add the tokens to the model "
                "(lemur convert --add_tokens)"
            ]
        )
    if have - need > MOST_UNNAMED_ROWS:
        raise ConfigError(
            [
                f"tokenizer.vocab_size={need} is much smaller than the model's vocab_size={have}: "
                f"{have - need} rows would have no token; {fix}"
            ]
        )
