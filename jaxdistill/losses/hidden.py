"""Matching hidden states: a term that compares those of student and teacher, beside the terms on scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.choices import check_choices
from jaxdistill.types import Mean, Outputs, Scalar, Tap

Distance = Literal["cosine", "mse", "normalized_mse", "channelwise"]
"""Between two vectors: 1 - cosine; the mean squared difference; the squared difference ÷ the teacher's square.
"channelwise": the squared difference of each channel ÷ the teacher's mean square in it over the whole batch."""

TINY = 1e-12

Point = Literal["input", "mixer_normed", "ffn_normed", "output", "final_normed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenMatch:
    """The mean distance of hidden states over pairs of layers and over supervised positions.

    layers: pairs (student's layer, teacher's layer); negative ones count from the end. None pairs every layer of the
    student with the one that it was made from. point: what of a layer is compared (`models.decoder.TAP_POINTS`); layer
    0's "input" is the embedding. "final_normed" is what the heads read, after the final norm, and belongs to no layer.
    Where the widths differ, the student's states go through one linear map for all pairs that is learned with the
    student (`parameters`).

    balance: the name of another term. This one is then scaled, without gradient, to be as large as that one at every
    step, and `weight` multiplies the result: L = L_logits + weight · L_hidden · sg(L_logits / L_hidden). Exact for the
    whole batch: with micro-batches a first pass over all of them finds the two values (one more forward pass of both
    models).

    Where the teacher has another tokenizer, states are compared at the ends of chunks, where both models have read the
    same text.

    Compact Language Models via Pruning and Knowledge Distillation (2407.14679): cosine, through one shared
    map, balanced; worth its cost where many layers were cut. Approximate Likelihood Matching (2503.20083): after the
    final norm, channelwise, for students on bytes.
    """

    layers: tuple[tuple[int, int], ...] | None = None
    point: Point = "output"
    distance: Distance = "cosine"
    weight: Scalar = 1.0
    balance: str | None = None

    def __post_init__(self):
        check_choices(self)
        if self.layers is not None:
            _check_pairs(self.layers)
            if self.point == "final_normed":
                raise ValueError(
                    f"HiddenMatch.layers is {self.layers} and point 'final_normed', which no layer has; leave `layers` "
                    'out, or give point="output" for what layers hand on.'
                )

    def resolved(self, *, student_depth: int, teacher_depth: int, kept: Sequence[int] | None) -> HiddenMatch:
        """This term with pairs of indices from 0. kept: the teacher's layers that the student was made of."""
        if self.point == "final_normed":
            return self
        origin = range(student_depth) if kept is None and student_depth == teacher_depth else kept
        if self.layers is None and (origin is None or len(origin) != student_depth):
            raise ValueError(
                f"HiddenMatch.layers is None, and which of the teacher's {teacher_depth} layers the student's "
                f"{student_depth} were made from is not known; give pairs (student's layer, teacher's layer)."
            )
        pairs = self.layers or tuple(enumerate(origin or ()))
        wrong = [(s, t) for s, t in pairs if not (-student_depth <= s < student_depth)]
        wrong += [(s, t) for s, t in pairs if not (-teacher_depth <= t < teacher_depth)]
        if wrong:
            raise ValueError(
                f"HiddenMatch.layers pairs {wrong}; the student has {student_depth} layers and the teacher "
                f"{teacher_depth}: indices run from -{student_depth} to {student_depth - 1} and from -{teacher_depth} "
                f"to {teacher_depth - 1}."
            )
        return dataclasses.replace(self, layers=tuple((s % student_depth, t % teacher_depth) for s, t in pairs))

    def parameters(self, key: Any, *, student_embed: int, teacher_embed: int) -> dict[str, Array]:
        """The map between the widths, [student_embed, teacher_embed]; none where they are equal."""
        if student_embed == teacher_embed:
            return {}
        return {"projection": jax.random.normal(key, (student_embed, teacher_embed)) * student_embed**-0.5}

    def tap(self, side: Literal["student", "teacher"]) -> Tap | None:
        """What a model's forward pass has to return for a resolved term, under the term's name."""
        if self.point == "final_normed":
            return None
        if self.layers is None or any(layer < 0 for pair in self.layers for layer in pair):
            raise ValueError(f"HiddenMatch.layers is {self.layers}; call `resolved` first, which knows both depths.")
        layers = tuple(sorted({pair[0 if side == "student" else 1] for pair in self.layers}))
        return Tap(points=(self.point,), reduce=lambda values, mask: values[self.point], layers=layers)

    def states(self, name: str, outputs: Outputs) -> Float[Array, "layer batch length embed"]:
        """What the term called name compares of a model's outputs."""
        return outputs.hidden[None] if self.point == "final_normed" else outputs.taps[name]

    def __call__(
        self,
        student: Float[Array, "student_layer batch length student_embed"],
        teacher: Float[Array, "teacher_layer batch length teacher_embed"],
        mask: Float[Array, "batch length"],
        parameters: Mapping[str, Array],
    ) -> Mean:
        """The mean over positions where mask is not 0, of a resolved term; student and teacher as `states` has them.

        "channelwise" gives a total and a count for each pair and channel, whose quotients are to be averaged.
        """
        totals, counts = [], []
        pairs = ((0, 0),) if self.point == "final_normed" else self.layers or ()
        student_layers, teacher_layers = ([*layers] for layers in zip(*pairs, strict=True))
        student_order, teacher_order = sorted({*student_layers}), sorted({*teacher_layers})
        for s, t in zip(student_layers, teacher_layers, strict=True):
            # Masked before anything is divided: whatever stands at padding must not reach a gradient.
            own, theirs = (
                jnp.where(mask[..., None] != 0, states, 0).astype(jnp.float32)
                for states in (student[student_order.index(s)], teacher[teacher_order.index(t)])
            )
            if "projection" in parameters:
                own = jnp.matmul(own, parameters["projection"], precision="highest")
            if self.distance == "channelwise":
                squares = (x**2 * mask[..., None] for x in (own - theirs, theirs))
                total, scale = (each.sum((0, 1)) for each in squares)
                totals.append(total)
                counts.append(scale + 1e-8 * mask.sum())
            else:
                totals.append((_distance(own, theirs, self.distance) * mask).sum())
        if self.distance == "channelwise":
            return Mean(jnp.stack(totals), jnp.stack(counts))
        return Mean(sum(totals) / len(totals), mask.sum())


@runtime_checkable
class Tapped(Protocol):
    """A term that reads what a model's layers hold."""

    def tap(self, side: Literal["student", "teacher"]) -> Tap | None: ...


def hidden_taps(terms: Mapping[str, Any], side: Literal["student", "teacher"]) -> dict[str, Tap]:
    """The taps that one of the models needs for an objective's resolved terms, by the terms' names."""
    asked = {name: term.tap(side) for name, term in terms.items() if isinstance(term, Tapped)}
    return {name: tap for name, tap in asked.items() if tap is not None}


def _check_pairs(layers: Any) -> None:
    """Refuses what is wrong with pairs of layers of any two models."""
    if not layers:
        raise ValueError("HiddenMatch.layers is empty; give at least one pair, or None for all layers.")
    pairs = isinstance(layers, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in layers)
    if not pairs or not all(isinstance(layer, int) for pair in layers for layer in pair):
        raise ValueError(
            f"HiddenMatch.layers is {layers}; give pairs of whole numbers, (student's layer, teacher's layer), such as "
            "((-2, -2),)."
        )
    repeated = sorted({pair for pair in layers if layers.count(pair) > 1})
    if repeated:
        raise ValueError(f"HiddenMatch.layers has the pairs {repeated} more than once; give each once.")


def _distance(
    student: Float[Array, "... embed"],
    teacher: Float[Array, "... embed"],
    kind: Literal["cosine", "mse", "normalized_mse"],
) -> Float[Array, "..."]:
    def dot(a: Array, b: Array) -> Array:
        return (a * b).sum(-1)

    match kind:
        case "cosine":
            norms = jax.lax.rsqrt(dot(student, student) + TINY) * jax.lax.rsqrt(dot(teacher, teacher) + TINY)
            return 1 - dot(student, teacher) * norms
        case "mse":
            return dot(student - teacher, student - teacher) / student.shape[-1]
        case "normalized_mse":
            return dot(student - teacher, student - teacher) / (dot(teacher, teacher) + TINY)
