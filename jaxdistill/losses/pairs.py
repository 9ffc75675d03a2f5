"""Terms on pairs of positions: a student's scores beside those of a teacher that has other tokens and other positions.

Positions of two tokenizations are paired on the device, from what the data says of their chunks. The teacher's hidden
states are brought to the student's positions, [batch, length, teacher_embed], and the chunked head scores both; the two
vocabularies differ, and what becomes of that is what the terms here are about.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.choices import check_choices
from jaxdistill.losses.alm import reduce_rows
from jaxdistill.losses.scores import Scores
from jaxdistill.losses.terms import Term, forward_kl
from jaxdistill.types import Outputs, PairedBatch, Scalar, at_step

Pairing = Literal["chunks", "index"]
"""Which of the teacher's positions belongs to one of the student's. "chunks": of the first position of each chunk, the
first one of the same chunk, since both have read the same text there. "index": of the k-th supervised position of a
segment, the k-th of the same segment, as far as the shorter side goes, whatever either has read by then."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """For each of the student's positions: whether it has a partner, and which of the teacher's positions that is (0
    without one). one_to_one: whether both are the only position of their chunk."""

    exists: Bool[Array, "batch length"]
    positions: Int[Array, "batch length"]
    one_to_one: Bool[Array, "batch length"]

    def bring(self, teacher: Outputs) -> Outputs:
        """The teacher's outputs at the student's positions; hidden states of 0 where there is no pair."""
        moved = jnp.take_along_axis(teacher.hidden, self.positions[..., None], axis=1)
        return Outputs(jnp.where(self.exists[..., None], moved, jnp.zeros((), moved.dtype)), teacher.head)


def pair_positions(pairing: Pairing, batch: PairedBatch) -> Pairs:
    """The pairs of a batch. Both sides number their segments, and the same chunks, in the order of the row."""
    return {"chunks": _by_chunk, "index": _by_index}[pairing](batch)


class PairTerm(Term):
    """A term on the scores of paired positions. The teacher's have the teacher's vocabulary, or whatever its size."""

    @property
    @abc.abstractmethod
    def pairs(self) -> Pairing:
        """How the positions are paired."""

    @abc.abstractmethod
    def counted(self, pairs: Pairs, loss_mask: Float[Array, "batch length"]) -> Float[Array, "batch length"]:
        """What each position counts for in the mean, from the data alone. Without a pair the teacher's hidden states
        are 0; a term counts such a position if its value there is of the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULD(PairTerm):
    """Σ |p_S - p_T| over ranks: both distributions sorted, the shorter one filled with zeros. No unit, at most 2.

    Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss (2402.12030). pairing: "index" is the
    paper's and its code's, from the start of the answer; "chunks" compares the models where they have read the same
    text, which is ours. The mean is over all pairs of the batch, in the authors' code over those of an answer first.
    The paper adds it to cross-entropy, the code with 1.5 times its weight. temperature divides both models' scores.

    It sorts both vocabularies at each position, whole on every device: with 49k ids 15 ms of a CPU for a position,
    forwards and backwards, where forward KL takes 4. ranks, which is ours: sort that many of the largest only, and
    compare what is left of both as if it were one id, which is never more than its ranks would give; 5 ms with 1024.
    """

    pairing: Pairing = "chunks"
    ranks: int | None = None
    temperature: Scalar = 1.0

    def __post_init__(self):
        check_choices(self)
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"ULD.ranks is {self.ranks}; give at least 1, or None for all.")
        _check_temperature("ULD", self.temperature)

    @property
    def pairs(self) -> Pairing:
        return self.pairing

    def counted(self, pairs, loss_mask):
        return pairs.exists * loss_mask

    def __call__(self, student, teacher, at, parameters):
        temperature = at_step(self.temperature, at.step)
        student, teacher = student.at_temperature(temperature), teacher.at_temperature(temperature)
        if self.ranks is None:
            return sorted_distance(student.gather_chunk().probs(), teacher.gather_chunk().probs())
        # The gap of what is left is that of the largest, with the other sign.
        gaps = _largest(student, self.ranks) - _largest(teacher, self.ranks)
        return jnp.abs(gaps).sum(-1) + jnp.abs(gaps.sum(-1))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MinED(PairTerm):
    """KL(teacher ‖ student), the teacher's distribution carried over to the student's ids, each of which takes the
    probability of the teacher's id that is spelled most like it. In nats.

    ids: int32 [student's vocabulary], the teacher's id for each (`align.edit_distance.minimum_edit_map`), -1 for none,
    as for ids beyond its end; None until `resolved`. A teacher's id that several ids take counts in full for each, one
    that none takes is left out, and the sum is made 1 again.

    Only where a single token of the student spells the same bytes as a single one of the teacher. All other supervised
    positions learn the text: cross-entropy, times `text_weight`. The mean is over both. temperature divides scores,
    also those of the cross-entropy, and the value is multiplied by its square unless `scale_by_square` is False, which
    is how the code of the papers has it, with a temperature of 2.

    Knowledge Fusion of Large Language Models (2401.10491) pairs tokens and ids by edit distance. The map from the
    student's ids, counts in full and cross-entropy elsewhere are from its use as a baseline in the code of Approximate
    Likelihood Matching (2503.20083); it pairs tokens by chunks, as here, and so aligned positions alone count there.
    """

    ids: np.ndarray | None = dataclasses.field(default=None, repr=False)
    text_weight: float = 1.0
    temperature: Scalar = 1.0
    scale_by_square: bool = True

    def __post_init__(self):
        _check_temperature("MinED", self.temperature)
        if not self.text_weight >= 0:
            raise ValueError(f"MinED.text_weight is {self.text_weight}; it must not be negative.")

    @property
    def pairs(self) -> Pairing:
        return "chunks"

    def resolved(self, ids: np.ndarray) -> MinED:
        """This term with the map between the two vocabularies."""
        return dataclasses.replace(self, ids=ids)

    def counted(self, pairs, loss_mask):
        return loss_mask

    def __call__(self, student, teacher, at, parameters):
        temperature = at_step(self.temperature, at.step)
        student = student.at_temperature(temperature)
        theirs = self.carried(teacher.at_temperature(temperature), student)
        text = student.log_normalizer() - student.take(at.targets)
        assert at.one_to_one is not None, "positions are paired"
        value = jnp.where(at.one_to_one, forward_kl(theirs, student), self.text_weight * text)
        return value * temperature**2 if self.scale_by_square else value

    def carried(self, teacher: Scores, student: Scores) -> Scores:
        """The teacher's scores for the student's ids, split as the student's are."""
        if self.ids is None:
            raise ValueError("MinED.ids is None; call `resolved` first, with the map between the two vocabularies.")
        whole = teacher.gather_chunk().local
        if self.ids.max() >= whole.shape[-1]:
            raise ValueError(
                f"MinED.ids names the teacher's id {self.ids.max()}, and the teacher scores {whole.shape[-1]}; "
                "make the map with the tokenizers of these two models."
            )
        ids = student.part(self.ids + 1) - 1  # so that ids beyond its end have none
        # Finite, since 0 times infinity is not 0.
        return Scores(jnp.where(ids < 0, -1e30, jnp.take(whole, ids, axis=1)), student.axes)


def _check_temperature(name: str, temperature: Scalar) -> None:
    if not callable(temperature) and not temperature > 0:
        raise ValueError(f"{name}.temperature is {temperature}; it must be positive.")


def _by_chunk(batch: PairedBatch) -> Pairs:
    own, theirs, slots = batch.chunks, batch.teacher_chunks, batch.chunks.shape[1]
    starts = (own > 0) & (own != jnp.pad(own, ((0, 0), (1, 0)))[:, :-1])
    sizes, their_sizes = (
        reduce_rows(jax.ops.segment_sum, jnp.ones_like(chunks), chunks, slots) for chunks in (own, theirs)
    )
    first = reduce_rows(jax.ops.segment_min, _positions(theirs), theirs, slots)

    def of_chunk(values: Array) -> Array:
        return jnp.take_along_axis(values, jnp.maximum(own - 1, 0), axis=1)

    exists = starts & (of_chunk(their_sizes) > 0)
    alone = exists & (of_chunk(sizes) == 1) & (of_chunk(their_sizes) == 1)
    return Pairs(exists=exists, positions=jnp.where(exists, of_chunk(first), 0), one_to_one=alone)


def _by_index(batch: PairedBatch) -> Pairs:
    sides = (batch, batch.teacher)
    slots = max(rows.tokens.shape[1] for rows in sides)
    supervised = [(rows.loss_mask != 0) & (rows.segment_ids > 0) for rows in sides]
    orders = [jnp.cumsum(marked, axis=1) for marked in supervised]  # 1, 2, … along the row
    counts = [
        reduce_rows(jax.ops.segment_sum, marked.astype(jnp.int32), rows.segment_ids, slots)
        for marked, rows in zip(supervised, sides, strict=True)
    ]

    def of_segment(values: Array) -> Array:
        return jnp.take_along_axis(values, jnp.maximum(batch.segment_ids - 1, 0), axis=1)

    before, theirs_before = (of_segment(jnp.cumsum(count, axis=1) - count) for count in counts)
    number = orders[0] - before  # 1, 2, … in the segment
    exists = supervised[0] & (number <= of_segment(counts[1]))
    place = reduce_rows(
        jax.ops.segment_min,
        _positions(orders[1]),
        jnp.where(supervised[1], orders[1], 0),
        batch.teacher.tokens.shape[1],
    )
    positions = jnp.take_along_axis(place, jnp.where(exists, theirs_before + number - 1, 0), axis=1)
    return Pairs(exists=exists, positions=jnp.where(exists, positions, 0), one_to_one=jnp.zeros(exists.shape, bool))


def _positions(rows: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)


def _largest(scores: Scores, ranks: int) -> Float[Array, "position ranks"]:
    """The largest probabilities, in falling order; zeros where there are no more ids."""
    values, _ = scores.top_k(ranks)
    probs = jnp.exp(values - scores.log_normalizer()[:, None])
    return jnp.pad(probs, ((0, 0), (0, ranks - probs.shape[1])))


@jax.custom_vjp
def sorted_distance(
    student: Float[Array, "position vocab"], teacher: Float[Array, "position teacher_vocab"]
) -> Float[Array, "position"]:
    """Σ |p_S - p_T| over ranks of whole distributions of any sizes; differentiable by the student."""
    return jnp.abs(_gaps(student, teacher)[1]).sum(-1)


def _sorted_distance_forward(student, teacher):
    ordered, gaps = _gaps(student, teacher)
    # Looking the probabilities up among themselves is faster than sorting ids along with them, and their slope is that
    # of their rank. Equal ones have the same.
    ranks = jax.vmap(jnp.searchsorted)(ordered, student) + gaps.shape[1] - ordered.shape[1]
    return jnp.abs(gaps).sum(-1), jnp.take_along_axis(jnp.sign(gaps), ranks, axis=1)


sorted_distance.defvjp(_sorted_distance_forward, lambda slopes, cotangent: (cotangent[:, None] * slopes, None))


def _gaps(student: Array, teacher: Array) -> tuple[Array, Array]:
    """The student's probabilities in rising order, and by how much they exceed the teacher's, rank by rank."""
    own, theirs = (_rising(probs) for probs in (student, teacher))
    size = max(own.shape[1], theirs.shape[1])
    filled, their_filled = (jnp.pad(x, ((0, 0), (size - x.shape[1], 0))) for x in (own, theirs))
    return own, filled - their_filled


def _rising(probs: Array) -> Array:
    # The bits of floats that are not negative rise with them, and whole numbers are sorted five times as fast on a CPU.
    return jax.lax.bitcast_convert_type(jnp.sort(jax.lax.bitcast_convert_type(probs, jnp.int32), axis=-1), jnp.float32)
