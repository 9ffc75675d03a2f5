"""Running texts through models: pieces packed into rows of one shape, values per position, exact sums per group.

One engine for everything that is evaluated. Values come back per position, so pieces of any length and purpose share
rows; sums are made on the host in float64. What a teacher says is computed once and serves every student.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.checkpoint.open import Model
from jaxdistill.data.packing import FirstFit, Piece, to_arrays
from jaxdistill.data.tokenize import Tokenized
from jaxdistill.evaluate.ensemble import Ensemble
from jaxdistill.losses.chunked import default_chunk, term_values
from jaxdistill.losses.terms import CrossEntropy, Term
from jaxdistill.models.decoder import Execution, apply, head_of
from jaxdistill.sharding import BATCH_AXES, Layout, put_global_batch
from jaxdistill.specs import ModelConfig
from jaxdistill.types import Batch, Outputs, Params

NATS: Mapping[str, Term] = {"nats": CrossEntropy()}
"""A model's own account of a text: -log p(target)."""

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


def silent(done: int, total: int) -> None:
    """No progress shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How texts are run through models. Every batch has the one shape [batch_size, length]."""

    length: int = 512
    """Tokens of a row, and the longest context of held-out text."""
    batch_size: int = 2
    """Rows of a batch; rounded up to what the mesh divides."""
    chunk: int | None = None
    """Positions that the head scores at once; None chooses by the vocabulary."""
    layout: Layout = Layout()
    execution: Execution = Execution()

    def __post_init__(self):
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Scoring.{name} is {getattr(self, name)}; it must be at least 1.")

    def shape(self, longest: int) -> tuple[int, int]:
        """(rows, length) of batches for pieces of up to `longest` positions: longer rows come in smaller numbers."""
        length = self.length if longest <= self.length else 1 << (longest - 1).bit_length()
        split = self.layout.split("batch")
        rows = max(1, self.batch_size * self.length // length)
        return -(-rows // split) * split, length


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """The fields of a `Batch` as NumPy arrays, and the group that each position belongs to (-1: padding)."""

    fields: dict[str, np.ndarray]
    groups: np.ndarray


def pack(pieces: Sequence[Piece], *, rows: int, length: int) -> list[PackedBatch]:
    """All pieces, longest first into the first row with room, as batches [rows, length]; the last has empty rows.

    A piece's group is the first entry of its `origin`.
    """
    packer = FirstFit(length=length, open_rows=max(1, len(pieces)))
    packed = [row for piece in sorted(pieces, key=len, reverse=True) for row in packer.add(piece)] + packer.rows
    batches = []
    for start in range(0, len(packed), rows):
        chosen = [list(row) for row in packed[start : start + rows]]
        groups = np.full((rows, length), -1, np.int64)
        for index, row in enumerate(chosen):
            owners = np.repeat([piece.origin[0] for piece in row], [len(piece) for piece in row])
            groups[index, : len(owners)] = owners
        batches.append(PackedBatch(to_arrays(chosen + [[]] * (rows - len(chosen)), length), groups))
    return batches


def whole_piece(ids: np.ndarray, supervised: np.ndarray, *, group: int) -> Piece:
    """A piece that holds all of these tokens; the first is only ever an input."""
    document = Tokenized(ids.astype(np.int32), supervised, np.zeros(len(ids), np.int32))
    return Piece(document, 0, len(ids) - 1, (group,))


def score(
    models: Mapping[str, Model],
    pieces: Sequence[Piece],
    *,
    groups: int,
    terms: Mapping[str, Term] = NATS,
    teacher: Model | None = None,
    compared: Mapping[str, Term] | None = None,
    scoring: Scoring = Scoring(),
    progress: Progress = silent,
) -> dict[str, dict[str, np.ndarray]]:
    """For each model and term, the sum over each group's supervised targets: float64 [groups].

    pieces: token ids that all models share, each with its group in `origin[0]`. terms: what a model says alone.
    teacher, compared: what it says beside the teacher, for all models but the teacher itself, which may be one of
    them. Raises ValueError for ids that a model lacks, and texts longer than its context.
    """
    for name, model in models.items():
        _check(name, model, pieces)
    sums = {
        name: {term: np.zeros(groups, np.float64) for term in _terms_of(model, terms, teacher, compared or {})}
        for name, model in models.items()
    }
    rows, length = scoring.shape(max((len(piece) for piece in pieces), default=1))
    batches = pack(pieces, rows=rows, length=length)
    for done, packed in enumerate(batches, 1):
        batch = Batch(**put_global_batch(scoring.layout, packed.fields))
        supervised = packed.fields["loss_mask"] != 0
        seen: dict[int, Outputs] = {}
        said = None if teacher is None else _outputs(teacher, batch, scoring, seen)
        for name, model in models.items():
            outputs = _outputs(model, batch, scoring, seen)
            beside = None if model is teacher else said
            wanted = tuple(_terms_of(model, terms, teacher, compared or {}).items())
            values = _values(wanted, _chunk(model, scoring), scoring.layout, outputs, beside, batch)
            for term, value in values.items():
                found = np.asarray(value, np.float64)[supervised]
                sums[name][term] += np.bincount(packed.groups[supervised], weights=found, minlength=groups)
        progress(done, len(batches))
    return sums


def position_values(
    name: str, model: Model, piece: Piece, terms: Mapping[str, Term], *, scoring: Scoring = Scoring()
) -> dict[str, np.ndarray]:
    """Each term's value at every position of one piece, supervised or not: float64 [len(piece)].

    name: what errors call the model; they are those of `score`.
    """
    if not len(piece):
        return {term: np.zeros(0) for term in terms}
    _check(name, model, [piece])
    rows, length = scoring.shape(len(piece))
    [packed] = pack([dataclasses.replace(piece, origin=(0,))], rows=rows, length=length)
    used = (packed.fields["segment_ids"] > 0).astype(np.float32)
    batch = Batch(**put_global_batch(scoring.layout, packed.fields | {"loss_mask": used}))
    outputs = _outputs(model, batch, scoring, {})
    values = _values(tuple(terms.items()), _chunk(model, scoring), scoring.layout, outputs, None, batch)
    return {term: np.asarray(value, np.float64)[0, : len(piece)] for term, value in values.items()}


def _terms_of(
    model: Model, terms: Mapping[str, Term], teacher: Model | None, compared: Mapping[str, Term]
) -> dict[str, Term]:
    return dict(terms) if teacher is None or model is teacher else {**terms, **compared}


def _check(name: str, model: Model, pieces: Sequence[Piece]) -> None:
    largest = max((int(piece.document.ids.max()) for piece in pieces), default=0)
    if largest >= model.config.vocab:
        raise ValueError(
            f"the texts have the token id {largest} and the model {name!r} has a vocabulary of {model.config.vocab}; "
            "its tokenizer belongs to another model. Give the model together with its own tokenizer."
        )
    longest = max((len(piece) for piece in pieces), default=0)
    if longest > model.config.max_length:
        raise ValueError(
            f"a text has {longest} tokens and the model {name!r} takes at most {model.config.max_length}; "
            "give a shorter text, or a smaller length."
        )


def _chunk(model: Model, scoring: Scoring) -> int:
    return scoring.chunk or default_chunk(model.config.vocab // scoring.layout.split("vocab"))


def _outputs(model: Model, batch: Batch, scoring: Scoring, seen: dict[int, Outputs]) -> Outputs:
    """What a model returns for a batch. seen: by model, what was computed for this batch before."""
    if id(model) in seen:
        return seen[id(model)]
    if isinstance(model, Ensemble):
        states = [_outputs(member, batch, scoring, seen).hidden for member in model.members]
        found = Outputs(hidden=jnp.concatenate(states, axis=-1), head=model.head)
    else:
        hidden = _hidden(model.config, scoring.layout, scoring.execution, model.params, batch)
        found = Outputs(hidden=hidden, head=head_of(model.config, model.params))
    seen[id(model)] = found
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _hidden(
    config: ModelConfig, layout: Layout, execution: Execution, params: Params, batch: Batch
) -> Float[Array, "batch length embed"]:
    return apply(config, params, batch, layout=layout, execution=execution).hidden


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _values(
    terms: tuple[tuple[str, Term], ...],
    chunk: int,
    layout: Layout,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
) -> dict[str, Any]:
    """Values on every device whole, so that each process can add them up."""
    values = term_values(
        dict(terms),
        student,
        teacher,
        targets=batch.targets,
        loss_mask=batch.loss_mask,
        chunk=chunk,
        layout=layout,
    )
    return {name: layout.constrain(value, (None,) * len(BATCH_AXES)) for name, value in values.items()}
