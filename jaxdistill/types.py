"""The few types that every room of the house shares: batches, sums, scores' raw material and the train state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays. Which axis is which is declared once, by the model's schema (`models.schema`)."""

Schedule = Callable[[Any], Any]
"""From the step (consumed batches) to a value; any optax schedule is one."""

Scalar = float | Schedule
"""A hyper-parameter that may change during training. Resolve it inside the step with `at_step`."""


def at_step(value: Scalar, step: Int[Array, ""] | int) -> Any:
    """The value of a hyper-parameter at one step: schedules are called, plain numbers are returned."""
    return value(step) if callable(value) else value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean that can still be added to: division happens once, over everything that was added.

    `total` and `count` may have any equal shape; a count of 0 has value 0 and gradient 0.
    """

    total: Any
    count: Any

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Any:
        empty = self.count == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed token rows as they enter a step. Every field is [batch, length].

    Position t holds an input token and the target that it predicts: `targets[t]` is the next token of the same
    document. That of a segment's last position is not in the segment: a document's last token is only ever a target.
    Segment 0 is padding. `loss_mask` is 1 where the *target* is supervised, so padding and prompts have 0.
    `target_bytes` counts the bytes of the original text that the target stands for, which makes bits per byte
    comparable across tokenizers.
    """

    tokens: Int[Array, "batch length"]
    targets: Int[Array, "batch length"]
    loss_mask: Float[Array, "batch length"]
    positions: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"]
    target_bytes: Int[Array, "batch length"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairedBatch(Batch):
    """The student's rows, and the same text as rows of a teacher with another tokenizer, in `teacher`.

    chunks [batch, length], teacher_chunks [batch, teacher's length]: of each position's target, the chunk that it
    belongs to: runs of tokens on either side that spell the same bytes have the same number, 1, 2, … along the row;
    0 is no chunk. A row of either side holds the same pieces of text, with the same segment ids.
    """

    chunks: Int[Array, "batch length"]
    teacher: Batch
    teacher_chunks: Int[Array, "batch teacher_length"]


def as_batch(rows: Mapping[str, Any], *, vocab: int, teacher_vocab: int | None = None) -> Batch:
    """The fields as a `Batch`, still on the host; as a `PairedBatch` where there is a "teacher" among them.

    Refuses ids that the models lack: a look-up of one would silently be nothing, or not a number.
    """
    largest = max(int(rows["tokens"].max()), int(rows["targets"].max()))
    if largest >= vocab:
        raise ValueError(
            f"the text has the token id {largest} and the models have {vocab} ids; the tokenizer has tokens that were "
            "never given to the model. Use text (or a chat template) without them, or another tokenizer."
        )
    fields: dict[str, Any] = dict(rows)
    if "teacher" not in fields:
        return Batch(**fields)
    theirs = dict(fields.pop("teacher"))
    chunks = theirs.pop("chunks")
    teacher = as_batch(theirs, vocab=vocab if teacher_vocab is None else teacher_vocab)
    return PairedBatch(**fields, teacher=teacher, teacher_chunks=chunks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden states into scores: `hidden @ kernel (+ bias)`, then a soft cap.

    kernel: [vocab, embed], the layout of the embedding table, so that a tied head is the table itself.
    bias: [vocab] or None. soft_cap: scores become `cap * tanh(scores / cap)`; None leaves them.
    members: the widths of several models' hidden states and kernels that stand side by side; scores are then the
    logarithm of the mean of their probabilities. None is one model.
    """

    kernel: Float[Array, "vocab embed"]
    bias: Float[Array, "vocab"] | None = None
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    members: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def vocab(self) -> int:
        return self.kernel.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model returns for a batch. Scores are never formed here: that is the chunked head's work.

    hidden: [batch, length, embed] after the final norm. taps: what `Tap.reduce` returned, stacked over the tapped
    layers.
    """

    hidden: Float[Array, "batch length embed"]
    head: Head
    taps: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tap:
    """Reads an activation inside the layer scan; only `reduce`'s result leaves the scan.

    points: activations of a block, such as "input" and "output" (see `models.decoder.TAP_POINTS`).
    layers: which layers; None is all. Layers not asked for cost no memory.
    reduce: (values: dict of the asked tap points [batch, length, ...], mask [batch, length]) -> pytree.
    """

    points: tuple[str, ...]
    reduce: Callable[[Mapping[str, Array], Float[Array, "batch length"]], Any]
    layers: tuple[int, ...] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint must hold.

    step: consumed batches, skipped ones included; schedules follow it. params: {"student": trainable leaves,
    "objective": parameters that terms learn}. rng: the run's key, never split; use `fold_in(rng, step)`.
    skipped: steps skipped in a row, and in all, because the loss or a gradient was not finite.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    rng: Any
    skipped: Int[Array, "2"]
