"""Several models of one tokenizer as one: their scores or their probabilities averaged at every position."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, get_args

import jax.numpy as jnp

from jaxdistill.checkpoint.open import Model
from jaxdistill.models.decoder import head_of
from jaxdistill.types import Head

Averaged = Literal["scores", "probabilities"]
"""What of the models is averaged: "scores" is the normalised geometric mean of their probabilities."""


@dataclasses.dataclass(frozen=True)
class Ensemble(Model):
    """Models that run on the same tokens in lockstep, read as one: config and tokenizer are the first one's, with the
    smallest vocabulary (over which each model's probabilities add up to 1) and the shortest context among them. Make
    one with `ensemble`."""

    members: tuple[Model, ...]
    averaged: Averaged

    @functools.cached_property
    def head(self) -> Head:
        """The heads side by side: one product scores the hidden states of all members, side by side as well."""
        kernels = [head_of(model.config, model.params).kernel[: self.config.vocab] for model in self.members]
        if self.averaged == "scores":
            return Head(jnp.concatenate(kernels, axis=1) / len(kernels))
        return Head(jnp.concatenate(kernels, axis=1), members=tuple(kernel.shape[1] for kernel in kernels))


def ensemble(models: Mapping[str, Model], averaged: Averaged) -> Ensemble:
    """One model out of several whose tokens are the same. Raises ValueError for fewer than two, or other tokens.

    Models with tokenizers of their own come together after a transfer to one (`student.tokenizer`).
    """
    if averaged not in get_args(Averaged):
        raise ValueError(f"{averaged!r} of models are to be averaged; allowed are {', '.join(get_args(Averaged))}.")
    if len(models) < 2:
        raise ValueError(f"an ensemble is of at least two models; given: {list(models)}.")
    (name, first), *others = models.items()
    for other, model in others:
        a, b = first.tokenizer, model.tokenizer
        if a.fingerprint != b.fingerprint and a.token_bytes() != b.token_bytes():
            raise ValueError(
                f"{name!r} and {other!r} have different tokens ({a.vocab_size} and {b.vocab_size} ids); move one of "
                "them to the other's tokenizer first (configs/retokenize.py)."
            )
    members = tuple(models.values())
    config = dataclasses.replace(
        first.config,
        vocab=min(model.config.vocab for model in members),
        max_length=min(model.config.max_length for model in members),
    )
    return Ensemble(config, {}, first.tokenizer, members, averaged)
