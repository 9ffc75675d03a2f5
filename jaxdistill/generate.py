"""Text generation: a batch of prompts in, sampled continuations out, with a KV cache, in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.models.decoder import Execution, Rows, apply_cached, init_cache, scores
from jaxdistill.sharding import BATCH_AXES, Layout
from jaxdistill.specs import ModelConfig
from jaxdistill.types import Params

SMALLEST_BUCKET = 16
"""Prompt lengths and numbers of new tokens are rounded up to powers of two from here: few shapes, few compilations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Filters apply to the tempered distribution: `top_k` first, then `top_p`."""

    temperature: float = 1.0
    """0 takes the most probable token (greedy; the filters then change nothing)."""
    top_k: int | None = None
    """Only the k most probable tokens; None keeps all."""
    top_p: float | None = None
    """Only the most probable tokens whose probabilities first sum to p (nucleus, arXiv 1904.09751); None keeps all."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0 (0 is greedy).")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None for no limit.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1], or be None for no limit.")


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: frozenset[int] = frozenset(),
    key: jax.Array | None = None,
    layout: Layout = Layout(),
    execution: Execution = Execution(),
) -> list[list[int]]:
    """Continue each prompt (token ids) by up to `max_new_tokens` tokens; the ids that follow it, one list per prompt.

    A continuation ends before the first token of `stop`. Prompts of different lengths share a batch; a prompt's
    continuation depends on the key and on its place in the list, not on its neighbours. `key` is needed unless
    temperature is 0. Raises ValueError for an empty prompt, or one that leaves no room in the model's context.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _check(config, prompts, max_new_tokens, sampling, key)
    if not prompts:
        return []
    tokens = _left_padded(prompts, rows=_bucket(len(prompts), 1, multiple=layout.split("batch")))
    made, lengths = _continue(
        config,
        sampling,
        _bucket(max_new_tokens, SMALLEST_BUCKET),
        stop,
        layout,
        execution,
        params,
        jax.device_put(tokens, layout.sharding(BATCH_AXES, tokens.tokens.shape)),
        jnp.arange(len(tokens.tokens)) >= len(prompts),
        jnp.asarray(max_new_tokens),
        jax.random.key(0) if key is None else key,
    )
    made, lengths = np.asarray(made), np.asarray(lengths)
    return [made[i, : lengths[i]].tolist() for i in range(len(prompts))]


def _check(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"temperature is {sampling.temperature} and no key is given; give key=jax.random.key(seed).")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; a prompt has at least one token (the begin-of-text token will do).")
        outside = [t for t in prompt if not 0 <= t < config.vocab]
        if outside:
            raise ValueError(f"prompt {i} has the token ids {outside[:5]}; allowed are 0 to {config.vocab - 1}.")
        if len(prompt) + max_new_tokens > config.max_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and {max_new_tokens} new ones are asked for; together the model "
                f"takes at most {config.max_length}. Shorten the prompt or lower max_new_tokens."
            )


def _bucket(size: int, smallest: int, multiple: int = 1) -> int:
    """The next power of two, rounded up to a multiple that the mesh can divide."""
    bucket = max(smallest, 1 << (size - 1).bit_length())
    return -(-bucket // multiple) * multiple


def _left_padded(prompts: Sequence[Sequence[int]], *, rows: int) -> Rows:
    """Prompts that all end in the last column, so that every row's next token comes from there."""
    length = _bucket(max(map(len, prompts)), SMALLEST_BUCKET)
    tokens, positions, segment_ids = (np.zeros((rows, length), np.int32) for _ in range(3))
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        positions[row, length - len(prompt) :] = np.arange(len(prompt))
        segment_ids[row, length - len(prompt) :] = 1
    return Rows(tokens, positions, segment_ids)  # pyright: ignore[reportArgumentType]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _continue(
    config: ModelConfig,
    sampling: Sampling,
    room: int,
    stop: frozenset[int],
    layout: Layout,
    execution: Execution,
    params: Params,
    prompts: Rows,
    done: Array,
    limit: Array,
    key: Array,
) -> tuple[Int[Array, "batch room"], Int[Array, "batch"]]:
    """New tokens and how many of them count. `done` rows make none; the loop ends early when all are done."""
    batch, length = prompts.tokens.shape
    stop_ids = jnp.asarray(sorted(stop), jnp.int32)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    advance = functools.partial(apply_cached, config, params, layout=layout, execution=execution)
    outputs, cache = advance(prompts, init_cache(config, batch, length + room, layout=layout, execution=execution))

    def unfinished(state):
        step, _, _, _, _, done = state
        return (step < limit) & ~jnp.all(done)

    def one_token(state):
        step, hidden, cache, made, lengths, done = state
        keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(row_keys)
        token = sample(scores(hidden, outputs.head), keys, sampling)
        done |= jnp.isin(token, stop_ids)
        made = jax.lax.dynamic_update_slice(made, token[:, None], (0, step))
        lengths += ~done
        next_position = prompts.positions[:, -1:] + 1 + step
        rows = Rows(token[:, None], next_position, jnp.ones_like(next_position))
        new, cache = advance(rows, cache)
        return step + 1, new.hidden[:, -1], cache, made, lengths, done

    made = jnp.zeros((batch, room), jnp.int32)
    state = (jnp.asarray(0), outputs.hidden[:, -1], cache, made, jnp.zeros(batch, jnp.int32), done)
    _, _, _, made, lengths, _ = jax.lax.while_loop(unfinished, one_token, state)
    return layout.constrain(made, (None, None)), layout.constrain(lengths, (None,))  # every process reads all of it


def sample(scores: Float[Array, "batch vocab"], keys: Array, sampling: Sampling) -> Int[Array, "batch"]:
    """One token per row, each with a key of its own."""
    if sampling.temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        smallest = jax.lax.top_k(scores, sampling.top_k)[0][:, -1:]
        scores = jnp.where(scores < smallest, -jnp.inf, scores)
    if sampling.top_p is not None and sampling.top_p < 1:
        descending = jnp.sort(scores, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token stays while those before it have not yet reached p: the first always stays.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < smallest, -jnp.inf, scores)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
