"""Dual-space distillation: each model's hidden states are brought into the other's space, and scored by its head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.alm import reduce_rows
from jaxdistill.losses.chunked import term_values
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term
from jaxdistill.sharding import Layout
from jaxdistill.types import Mean, Outputs, PairedBatch, Scalar, Tap


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSKD:
    """Cross-entropy and KL in the student's space, KL in the teacher's: the sum of all three, in nats.

    Attention from the student's positions to the teacher's, over their tokens and targets, says which of the teacher's
    hidden states stand for one of the student's. Projected into the student's space and scored by its head they learn
    the text (cross-entropy; the projections alone learn), and teach the student (`student_space`). The same scores of
    attention, read the other way, bring the student's states to the teacher's positions; projected and scored by the
    teacher's head they learn from the teacher (`teacher_space`). The head that scores projected states, and embeddings,
    learn nothing from this; the student's learns from `student_space` as from any term on its scores.

    only_right: `student_space` counts only where the projected teacher ranks the text's token first.

    Divided by the student's supervised positions, all three. Positions attend within their segment, to all that is
    supervised there, also to what comes later in the text: it is their own next token that they are found by. The last
    position of a segment takes no part, because its target is not in the row.

    Dual-Space Knowledge Distillation (2406.17328): the three losses, attention over embeddings of tokens and targets,
    the scale of its scores. From the authors' code: the biases, `only_right`, the one count for all, the temperature of
    2 without its square, and that keys and the teacher's values are divided by their standard deviation, there over the
    whole batch with its padding, here over the segment, so that packing and micro-batches change nothing. The paper
    adds this and cross-entropy in equal parts.

    Memory: a [length, teacher_length] array for each row, no scores of more than a chunk of positions.
    """

    student_space: Term = dataclasses.field(default_factory=lambda: ForwardKL(temperature=2.0, scale_by_square=False))
    teacher_space: Term = dataclasses.field(default_factory=lambda: ForwardKL(temperature=2.0, scale_by_square=False))
    only_right: bool = True
    weight: Scalar = 1.0

    def parameters(self, key: Any, *, student_embed: int, teacher_embed: int) -> dict[str, Array]:
        """The maps of queries (twice as wide, for token and target) and of either side's states, with their biases."""
        sizes = {
            "query": (2 * student_embed, 2 * teacher_embed),
            "to_student": (teacher_embed, student_embed),
            "to_teacher": (student_embed, teacher_embed),
        }
        found = {}
        for index, (name, shape) in enumerate(sizes.items()):
            found[name] = jax.random.normal(jax.random.fold_in(key, index), shape) * shape[0] ** -0.5
            found[f"{name}_bias"] = jnp.zeros(shape[1])
        return found

    def tap(self, side: Literal["student", "teacher"]) -> Tap:
        """What either model has to return under the term's name: the embeddings of its tokens."""
        return Tap(points=("input",), reduce=lambda values, mask: values["input"], layers=(0,))

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: PairedBatch,
        embeddings: Float[Array, "1 batch length embed"],
        teacher_embeddings: Float[Array, "1 batch teacher_length teacher_embed"],
        parameters: Mapping[str, Array],
        *,
        step: Int[Array, ""] | int,
        chunk: int,
        layout: Layout = Layout(),
        teacher_layout: Layout | None = None,
    ) -> Mean:
        """The sum of the three losses over the batch, and the number of the student's positions in it.

        embeddings: as tapped. The teacher, embeddings, and the heads of projected states are not differentiated.
        """
        own = _side(student, embeddings[0], batch)
        theirs = jax.lax.stop_gradient(_side(teacher, teacher_embeddings[0], batch.teacher))
        meet = own.used[:, :, None] & theirs.used[:, None, :]
        meet &= own.segment_ids[:, :, None] == theirs.segment_ids[:, None, :]
        to_student, to_teacher = _attention(own, theirs, meet, parameters)
        values = _divided(theirs.hidden, theirs) + _divided(theirs.targets, theirs)
        brought = _product(to_student, _mapped(parameters, "to_student", values))
        sent = _product(to_teacher, _mapped(parameters, "to_teacher", own.hidden))

        heads = jax.lax.stop_gradient((student.head, teacher.head))
        projected = Outputs(brought.astype(student.hidden.dtype), heads[0])
        taught = Outputs(sent.astype(teacher.hidden.dtype), heads[1])
        here = {"targets": batch.targets, "loss_mask": batch.loss_mask * meet.any(2), "layout": layout}
        rows = batch.teacher
        there = {"targets": rows.targets, "loss_mask": rows.loss_mask * meet.any(1), "layout": teacher_layout or layout}
        in_student = _WhereRight(term=self.student_space) if self.only_right else self.student_space
        found = (
            term_values({"text": CrossEntropy()}, projected, None, step=step, chunk=chunk, **here),
            term_values({"kl": in_student}, student, projected, step=step, chunk=chunk, **here),
            term_values({"kl": self.teacher_space}, taught, teacher, step=step, chunk=chunk, **there),
        )
        return Mean(sum(x.sum() for each in found for x in each.values()), here["loss_mask"].sum())


class _Side(NamedTuple):
    """One model's rows in float32, 0 where not `used`: supervised, and with the next token in the same segment."""

    hidden: Float[Array, "batch length embed"]
    tokens: Float[Array, "batch length embed"]
    targets: Float[Array, "batch length embed"]
    used: Bool[Array, "batch length"]
    segment_ids: Int[Array, "batch length"]


def _side(outputs: Outputs, embeddings: Array, rows: Any) -> _Side:
    def following(values: Array) -> Array:
        return jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)

    embeddings, segments = jax.lax.stop_gradient(embeddings), rows.segment_ids
    used = (rows.loss_mask != 0) & (segments > 0) & (following(segments) == segments)

    def kept(values: Array) -> Array:
        return jnp.where(used[..., None], values, 0).astype(jnp.float32)

    return _Side(kept(outputs.hidden), kept(embeddings), kept(following(embeddings)), used, segments)


def _attention(
    own: _Side, theirs: _Side, meet: Bool[Array, "batch length teacher_length"], parameters: Mapping[str, Array]
) -> tuple[Array, Array]:
    """What each of the student's positions takes of the teacher's, [batch, length, teacher_length], and the reverse,
    [batch, teacher_length, length]; rows sum to 1, or to 0 where there is nothing to take. meet: which may."""
    queries = _mapped(parameters, "query", jnp.concatenate([own.tokens, own.targets], axis=-1))
    keys = _divided(jnp.concatenate([theirs.tokens, theirs.targets], axis=-1), theirs)
    scores = jnp.einsum("bse,bte->bst", queries, keys, precision="highest") * keys.shape[-1] ** -0.5

    def shares(scores: Array, allowed: Array) -> Array:
        return jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1), 0.0)

    return shares(scores, meet), shares(scores.swapaxes(1, 2), meet.swapaxes(1, 2))


def _mapped(parameters: Mapping[str, Array], name: str, values: Array) -> Array:
    return _product(values, parameters[name]) + parameters[f"{name}_bias"]


def _divided(values: Float[Array, "batch length width"], side: _Side) -> Float[Array, "batch length width"]:
    """Values divided by their standard deviation over positions and channels of the segment."""
    slots, width = side.used.shape[1], values.shape[-1]

    def mean(of_position: Array) -> Array:
        sums = reduce_rows(jax.ops.segment_sum, of_position, side.segment_ids, slots)
        count = reduce_rows(jax.ops.segment_sum, side.used.astype(jnp.float32) * width, side.segment_ids, slots)
        each = sums / jnp.maximum(count, 1.0)
        return jnp.take_along_axis(each, jnp.maximum(side.segment_ids - 1, 0), axis=1)

    centred = jnp.where(side.used[..., None], values - mean(values.sum(-1))[..., None], 0.0)
    variance = mean((centred**2).sum(-1))
    return values * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0))[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WhereRight(Term):
    """A term where the teacher ranks the text's token first, 0 elsewhere."""

    term: Term

    def __call__(self, student, teacher, at, parameters):
        return jnp.where(teacher.argmax() == at.targets, self.term(student, teacher, at, parameters), 0.0)


def _product(left: Any, right: Any) -> Any:
    """In full float32 on every device, as all arithmetic of losses."""
    return jnp.matmul(left, right, precision="highest")
