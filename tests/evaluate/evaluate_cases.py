"""Tiny models over bytes with NumPy parameters, and what they say of a text by a plain loop."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from tiny import llama

from jaxdistill.checkpoint.open import Model
from jaxdistill.models.decoder import Rows, apply, head_of
from jaxdistill.models.schema import abstract_params, param_shardings
from jaxdistill.sharding import Layout
from jaxdistill.tokenizers import ByteTokenizer


def byte_model(seed: int, *, layers: int = 2, vocab: int = 264, tokenizer=None, max_length: int = 2048) -> Model:
    """Random parameters, large enough that two models disagree. 264 ids: 256 bytes, 5 special ones, 3 unused."""
    config = dataclasses.replace(llama(vocab=vocab, layers=layers), max_length=max_length)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(config))
    return Model(config, params, tokenizer or ByteTokenizer())


def placed(model: Model, layout: Layout) -> Model:
    params = jax.device_put(model.params, param_shardings(model.config, layout))
    return dataclasses.replace(model, params=params)


LONGEST = 96


def log_probs(model: Model, ids: list[int]) -> np.ndarray:
    """Log-probabilities [len(ids), vocab] of the token after each id, of a row on its own, in float64."""
    # Padding follows the row, where nothing of it can be seen: one length, one compilation.
    tokens, segments = np.zeros((1, LONGEST), np.int32), np.zeros((1, LONGEST), np.int32)
    tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    hidden = _hidden(model.config, model.params, Rows(tokens, np.arange(LONGEST)[None], segments))
    hidden = np.asarray(hidden, np.float64)[0, : len(ids)]
    scores = hidden @ np.asarray(head_of(model.config, model.params).kernel, np.float64).T
    peak = scores.max(-1, keepdims=True)
    return scores - peak - np.log(np.exp(scores - peak).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config, params, rows):
    return apply(config, params, rows).hidden
