"""Approximate likelihood matching: two models with different tokenizers agree when they find stretches of text equally
likely (Cross-Tokenizer Distillation via Approximate Likelihood Matching, 2503.20083).

Two tokenizations of one text are cut into chunks, the shortest runs of tokens on either side that spell the same
bytes. What a model gives a chunk is the sum of its tokens' log-probabilities, so no vocabulary is ever compared with
another. Chunks are int32 ids per position and sums are segment sums: memory grows with length, not with its square.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.choices import check_choices
from jaxdistill.losses.terms import Term
from jaxdistill.types import Mean, Scalar

Divergence = Literal[
    "binary_kl",
    "binary_cross_entropy",
    "reverse_binary_kl",
    "temperature_limit",
    "absolute",
    "absolute_probability",
    "k2",
    "k3",
]
"""Between the likelihoods of a chunk, log-probabilities t (teacher) and s (student), and p = exp(t / temperature),
q = exp(s / temperature). "binary_kl": KL of (p, 1 - p) from (q, 1 - q); "binary_cross_entropy" is larger by the
teacher's entropy, with the same gradient; "reverse_binary_kl": the two exchanged; "temperature_limit": temperature
times "binary_kl" as the temperature grows; "absolute": |t - s|; "absolute_probability": |p - q|; "k2": r² / 2 and "k3":
exp(r) - 1 - r of r = (t - s) / temperature; that is infinite where r exceeds 88, at low temperatures."""

Denominator = Literal["groups", "chunks", "teacher_tokens"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """How likely one model finds its own tokens of a text, along one side of an alignment; every field [batch, length].

    log_probs: of each position's target. ends: at each position, of the event that a chunk ends there, see `EndsChunk`.
    chunks: the chunk of each position's target, 1, 2, … along the row, 0 for none.
    """

    log_probs: Float[Array, "batch length"]
    ends: Float[Array, "batch length"]
    chunks: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EndsChunk(Term):
    """log Σ p_S over the ids that can follow the end of a chunk: such as begin with white space, and special ones.

    ids: bool [vocab] (`align.boundary_mask`); ids that the model has beyond it are none of them.
    """

    ids: np.ndarray

    def __call__(self, student, teacher, at, parameters):
        return student.log_share(self.ids, at.known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALM:
    """The mean divergence of the likelihoods of chunks.

    temperature divides log-likelihoods before they become probabilities: at 100 both are close to 1, and the gradient
    follows the relative error of s. It is of size 1 / temperature.

    merge_threshold: a chunk that ends where the teacher gives less than this to "a word ends here" is joined with the
    next: the two tokenizers may disagree on whether such a chunk is complete, which biases its likelihood. None keeps
    chunks as the data gives them. append_end: the log-probability that the word ends is added to the chunk's, on both
    sides. What "ends" means: a token follows that begins with one of `white_space`, or a special one.

    denominator: what the sum is divided by. "groups" are chunks after merging, which only the teacher can tell:
    with micro-batches its forward pass runs once more, before everything else. "chunks" (before merging) and
    "teacher_tokens" are known from the data.

    Defaults are those of the authors' code; epsilon, which keeps probabilities from 1, is too.
    """

    divergence: Divergence = "binary_kl"
    temperature: float = 100.0
    merge_threshold: float | None = 0.1
    append_end: bool = True
    white_space: tuple[str, ...] = (" ", "\t", "\n")
    denominator: Denominator = "groups"
    epsilon: float = 1e-6
    weight: Scalar = 1.0

    def __post_init__(self):
        check_choices(self)
        if not self.temperature > 0 or not self.epsilon > 0:
            raise ValueError(
                f"ALM.temperature is {self.temperature} and ALM.epsilon {self.epsilon}; both must be positive."
            )
        if self.merge_threshold is not None and not 0 <= self.merge_threshold <= 1:
            raise ValueError(f"ALM.merge_threshold is {self.merge_threshold}; give a probability, or None.")

    @property
    def needs_ends(self) -> bool:
        """Whether `Path.ends` is read."""
        return self.append_end or self.merge_threshold is not None

    def __call__(self, student: Path, teacher: Path) -> Mean:
        """The sum over all chunks of the batch, and what it is to be divided by. The teacher is never differentiated.

        Both sides number the same chunks; a chunk must not span two segments.
        """
        teacher = jax.lax.stop_gradient(teacher)
        found = self.compare(student, teacher)
        counted = {"chunks": found.chunks, "groups": found.groups, "teacher_tokens": teacher.chunks > 0}
        return Mean(found.divergence.sum(), counted[self.denominator].sum().astype(jnp.float32))

    def compare(self, student: Path, teacher: Path) -> Compared:
        """What the sum is over, chunk by chunk and group by group; both sides are differentiated."""
        slots = min(student.chunks.shape[1], teacher.chunks.shape[1])
        own, theirs = _chunks(student, slots), _chunks(teacher, slots)
        chunks = theirs.exists
        own, theirs, group = _joined(self.merge_threshold, own, theirs)
        s, t = (side.log_probs + side.ends if self.append_end else side.log_probs for side in (own, theirs))
        # Where there is no chunk any likelihood but 0 will do: its divergence is finite, and so is its gradient.
        s, t = (jnp.where(theirs.exists, jnp.minimum(x, 0.0), -1.0) for x in (s, t))
        found = divergence(self.divergence, s, t, temperature=self.temperature, epsilon=self.epsilon)
        return Compared(chunks, group, theirs.exists, s, t, jnp.where(theirs.exists, found, 0.0))


class Compared(NamedTuple):
    """Chunks and what became of them, each field [batch, slots]. chunks: whether there is one in the slot. group: the
    slot that its group is in. groups: whether there is one in the slot; student, teacher: its log-likelihoods, ends
    included; divergence: of the two, 0 where there is no group."""

    chunks: Any
    group: Int[Array, "batch slots"]
    groups: Any
    student: Float[Array, "batch slots"]
    teacher: Float[Array, "batch slots"]
    divergence: Float[Array, "batch slots"]


class Chunks(NamedTuple):
    """One side's chunks, each field [batch, slots]. exists: whether there is one in the slot. follows: whether the next
    slot's chunk begins where this one ends. ended: whether the position after it exists, so that `ends` is known."""

    log_probs: Float[Array, "batch slots"]
    ends: Float[Array, "batch slots"]
    exists: Any
    follows: Any
    ended: Any


def last_positions(chunks: Int[Array, "batch length"], slots: int) -> Int[Array, "batch slots"]:
    """The position of each chunk's last target, -1 where there is no such chunk."""
    positions = jnp.broadcast_to(jnp.arange(chunks.shape[1]), chunks.shape)
    return jnp.maximum(reduce_rows(jax.ops.segment_max, positions, chunks, slots), -1)


def positions_after(
    chunks: Int[Array, "batch length"], segment_ids: Int[Array, "batch length"], slots: int
) -> tuple[Int[Array, "batch slots"], Array]:
    """The position that has read a chunk whole, the one whose input is its last token; and whether the row has it."""
    last = last_positions(chunks, slots)
    after = jnp.minimum(last + 1, chunks.shape[1] - 1)
    same = _at(segment_ids, after) == _at(segment_ids, jnp.maximum(last, 0))
    return after, (last >= 0) & (after > last) & same


def _chunks(path: Path, slots: int) -> Chunks:
    after, ended = positions_after(path.chunks, path.segment_ids, slots)
    return Chunks(
        log_probs=reduce_rows(jax.ops.segment_sum, path.log_probs, path.chunks, slots),
        ends=jnp.where(ended, _at(path.ends, after), 0.0),
        exists=last_positions(path.chunks, slots) >= 0,
        follows=ended & (_at(path.chunks, after) == jnp.arange(2, slots + 2)),
        ended=ended,
    )


def _joined(threshold: float | None, own: Chunks, theirs: Chunks) -> tuple[Chunks, Chunks, Array]:
    """Both sides' chunks, each joined with the next ones until the teacher says that a word may end; and the slot that
    each chunk is then in."""
    known = own.ended & theirs.ended
    own, theirs = (side._replace(ends=jnp.where(known, side.ends, 0.0)) for side in (own, theirs))
    if threshold is None:
        return own, theirs, jnp.broadcast_to(jnp.arange(own.exists.shape[1]), own.exists.shape)
    closes = (jnp.exp(theirs.ends) > threshold) | ~(own.follows & theirs.follows)
    group = jnp.cumsum(closes, axis=1) - closes  # how many groups were closed before
    slots = closes.shape[1]

    def join(side: Chunks) -> Chunks:
        def total(values: Array) -> Array:
            return reduce_rows(jax.ops.segment_sum, values, group + 1, slots)

        return side._replace(
            log_probs=total(jnp.where(side.exists, side.log_probs, 0.0)),
            ends=total(jnp.where(closes & side.exists, side.ends, 0.0)),
            exists=total(side.exists.astype(jnp.int32)) > 0,
        )

    return join(own), join(theirs), group


def reduce_rows(reduce: Any, values: Array, ids: Array, slots: int) -> Array:
    """Values of the ids 1 to `slots` reduced by one of `jax.ops.segment_*`, row by row: [batch, slots]."""
    return jax.vmap(lambda v, i: reduce(v, i, num_segments=slots + 1)[1:])(values, ids)


def _at(values: Array, positions: Array) -> Array:
    return jnp.take_along_axis(values, positions, axis=1)


def divergence(
    kind: Divergence, student: Array, teacher: Array, *, temperature: float = 100.0, epsilon: float = 1e-6
) -> Array:
    """The divergence of log-likelihoods (at most 0), element by element; see `Divergence`."""
    if kind == "absolute":
        return jnp.abs(teacher - student)
    if kind in ("k2", "k3"):
        ratio = (teacher - student) / temperature
        return ratio**2 / 2 if kind == "k2" else jnp.expm1(ratio) - ratio
    if kind == "temperature_limit":
        s, t = student - epsilon, teacher - epsilon
        return (t - s) + t * (jnp.log(-s) - jnp.log(-t))
    s, t = student / temperature - epsilon, teacher / temperature - epsilon
    match kind:
        case "absolute_probability":
            return jnp.abs(jnp.exp(t) - jnp.exp(s))
        case "binary_cross_entropy":
            return -jnp.exp(t) * s + jnp.expm1(t) * log1mexp(s)
        case "binary_kl":
            return binary_kl(t, s)
        case "reverse_binary_kl":
            return binary_kl(s, t)


def binary_kl(one: Array, other: Array) -> Array:
    """KL of (p, 1 - p) from (q, 1 - q), given log p and log q below 0."""
    return jnp.exp(one) * (one - other) - jnp.expm1(one) * (log1mexp(one) - log1mexp(other))


def log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, exact to rounding at both ends."""
    near = x > -0.693
    # Each branch gets what it can take, or the one not chosen would bring 0 times infinity into the gradient.
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
