"""Terms on two tokenizations of one text: what each model makes of its own tokens, brought together chunk by chunk.

Values of single positions come from the chunked head (`losses.chunked.term_values`), so neither model's scores of more
than a few positions ever exist; a term then compares [batch, length] numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.losses.alm import ALM, EndsChunk, Path, positions_after
from jaxdistill.losses.chunked import term_values
from jaxdistill.losses.terms import CrossEntropy, Term
from jaxdistill.sharding import Layout
from jaxdistill.types import Mean, Outputs, PairedBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Ends:
    """Of each tokenizer the ids that can follow the end of a chunk, bool [vocab]; see `EndsChunk`."""

    student: np.ndarray
    teacher: np.ndarray


def aligned_means(
    terms: Mapping[str, Term | ALM],
    student: Outputs,
    teacher: Outputs | None,
    batch: PairedBatch,
    *,
    ends: Mapping[str, Ends],
    parameters: Mapping[str, Mapping[str, Any]],
    step: Int[Array, ""] | int,
    chunk: int,
    layout: Layout = Layout(),
    teacher_layout: Layout | None = None,
) -> dict[str, Mean]:
    """Each term's `Mean` over the batch, its total differentiable by the student and `parameters`.

    terms: those on the student's scores alone are means over supervised positions. student, teacher: of their own
    rows. ends: for the `ALM` terms that read them. The teacher is not differentiated.
    """
    matching = {name: term for name, term in terms.items() if isinstance(term, ALM)}
    own = {name: term for name, term in terms.items() if not isinstance(term, ALM)}
    asked = {name: {} for name in ("student", "teacher")}
    for name, term in matching.items():
        if term.needs_ends:
            asked["student"][f"{name}.ends"] = EndsChunk(ids=ends[name].student)
            asked["teacher"][f"{name}.ends"] = EndsChunk(ids=ends[name].teacher)
    values = term_values(
        {**own, _LIKELIHOOD: CrossEntropy(), **asked["student"]},
        student,
        None,
        targets=batch.targets,
        loss_mask=_used(batch.segment_ids),
        parameters=parameters,
        step=step,
        chunk=chunk,
        layout=layout,
    )
    found = {name: Mean((values[name] * batch.loss_mask).sum(), batch.loss_mask.sum()) for name in own}
    if matching:
        assert teacher is not None, "chunks are compared with a teacher's"
        theirs = term_values(
            {_LIKELIHOOD: CrossEntropy(), **asked["teacher"]},
            jax.lax.stop_gradient(teacher),
            None,
            targets=batch.teacher.targets,
            loss_mask=_used(batch.teacher.segment_ids),
            chunk=chunk,
            layout=teacher_layout or layout,
        )
        for name, term in matching.items():
            found[name] = term(
                _path(values, name, batch.chunks, batch.segment_ids),
                _path(theirs, name, batch.teacher_chunks, batch.teacher.segment_ids),
            )
    return found


_LIKELIHOOD = "likelihood"


def _path(values: Mapping[str, Array], name: str, chunks: Array, segment_ids: Array) -> Path:
    likelihood = -values[_LIKELIHOOD]
    ends = values.get(f"{name}.ends", jnp.zeros_like(likelihood))
    return Path(log_probs=likelihood, ends=ends, chunks=chunks, segment_ids=segment_ids)


def _used(segment_ids: Int[Array, "batch length"]) -> Float[Array, "batch length"]:
    return (segment_ids > 0).astype(jnp.float32)


def at_chunk_ends(
    batch: PairedBatch,
    student: Float[Array, "layer batch length embed"],
    teacher: Float[Array, "layer batch teacher_length teacher_embed"],
) -> tuple[Array, Array, Float[Array, "batch slots"]]:
    """Hidden states where either model has just read a chunk, [layer, batch, slots, embed], and which slots have one.

    There both have seen the same text, whatever tokens it is.
    """
    slots = min(batch.chunks.shape[1], batch.teacher_chunks.shape[1])
    own, ended = positions_after(batch.chunks, batch.segment_ids, slots)
    theirs, also = positions_after(batch.teacher_chunks, batch.teacher.segment_ids, slots)

    def take(states: Array, positions: Array) -> Array:
        return jnp.take_along_axis(states, positions[None, :, :, None], axis=2)

    return take(student, own), take(teacher, theirs), (ended & also).astype(jnp.float32)
