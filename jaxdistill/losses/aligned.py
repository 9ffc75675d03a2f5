"""Terms on two tokenizations of one text: what each model makes of its own tokens, brought together chunk by chunk.

Values of single positions come from the chunked head (`losses.chunked.term_values`), so neither model's scores of more
than a few positions ever exist. A term then compares [batch, length] numbers of both sides (`losses.alm`), or was given
the scores of paired positions (`losses.pairs`), or of states that were brought into the other's space
(`losses.dual_space`).
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
from jaxdistill.losses.dual_space import DSKD
from jaxdistill.losses.pairs import Pairing, PairTerm, pair_positions
from jaxdistill.losses.scores import Scores
from jaxdistill.losses.terms import CrossEntropy, Parameterized, Positions, Term
from jaxdistill.sharding import Layout
from jaxdistill.types import Mean, Outputs, PairedBatch

ACROSS_TOKENIZERS = (ALM, PairTerm, DSKD)
"""The terms that compare two tokenizations of a text, and so read a `PairedBatch`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ends:
    """Of each tokenizer the ids that can follow the end of a chunk, bool [vocab]; see `EndsChunk`."""

    student: np.ndarray
    teacher: np.ndarray

    def __post_init__(self):
        if not (self.student.any() and self.teacher.any()):
            raise ValueError("no id can follow the end of a chunk; give white space that tokens begin with.")


def aligned_means(
    terms: Mapping[str, Term | ALM | DSKD],
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
    rows; for `DSKD` with what it taps. ends: for the `ALM` terms that read them. The teacher is not differentiated.

    Raises ValueError for terms that compare scores of equal ids at equal positions, of which there are none.
    """
    matching = {name: term for name, term in terms.items() if isinstance(term, ALM)}
    pairing = {name: term for name, term in terms.items() if isinstance(term, PairTerm)}
    own = {name: term for name, term in terms.items() if not isinstance(term, ALM | PairTerm | DSKD)}
    check_terms_on_pairs(terms, vocab=student.head.vocab)
    asked = {name: {} for name in ("student", "teacher")}
    for name, term in matching.items():
        if term.needs_ends:
            asked["student"][_ENDS + name] = EndsChunk(ids=ends[name].student)
            asked["teacher"][_ENDS + name] = EndsChunk(ids=ends[name].teacher)
    likelihood = {_LIKELIHOOD: CrossEntropy()} if matching else {}
    alone = {**own, **likelihood, **asked["student"]}
    options = {"step": step, "chunk": chunk, "layout": layout, "teacher_layout": teacher_layout}
    masks = dict.fromkeys(own, batch.loss_mask)
    values, masks = _at_positions(alone, pairing, masks, student, teacher, batch, parameters=parameters, **options)
    found = {name: Mean(values[name].sum(), mask.sum()) for name, mask in masks.items()}
    if matching:
        assert teacher is not None, "chunks are compared with a teacher's"
        theirs = term_values(
            {**likelihood, **asked["teacher"]},
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
    for name, term in terms.items():
        if isinstance(term, DSKD):
            assert teacher is not None, "spaces are a student's and a teacher's"
            taps = (student.taps[name], teacher.taps[name])
            found[name] = term(student, teacher, batch, *taps, parameters[name], **options)
    return found


def _at_positions(
    alone: Mapping[str, Term],
    pairing: Mapping[str, PairTerm],
    masks: Mapping[str, Array],
    student: Outputs,
    teacher: Outputs | None,
    batch: PairedBatch,
    *,
    parameters: Mapping[str, Mapping[str, Any]],
    **options: Any,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The values of terms at the student's positions, and what each position counts for those that have a mean. masks:
    of those on the student alone."""
    passes: dict[Pairing | None, dict[str, Term]] = {term.pairs: {} for term in pairing.values()} or {None: {}}
    # What is asked of the student alone goes along with the first pairs; other pairs need a pass of their own.
    next(iter(passes.values())).update(alone)
    for name, term in pairing.items():
        passes[term.pairs][name] = term
    values, masks = {}, dict(masks)
    for kind, some in passes.items():
        if not some:
            continue
        brought, given = None, {}
        if kind is not None:
            assert teacher is not None, "positions are paired with a teacher's"
            pairs = pair_positions(kind, batch)
            brought, given = jax.lax.stop_gradient(pairs.bring(teacher)), {"one_to_one": pairs.one_to_one}
            masks |= {name: term.counted(pairs, batch.loss_mask) for name, term in pairing.items() if name in some}
        values |= term_values(
            some,
            student,
            brought,
            targets=batch.targets,
            loss_mask=_used(batch.segment_ids),
            masks={name: mask for name, mask in masks.items() if name in some},
            parameters={name: own for name, own in parameters.items() if name in some},
            **given,
            **options,
        )
    return values, masks


# Beside the terms' names, which hold no such character.
_LIKELIHOOD, _ENDS = "\0likelihood", "\0ends of "


class _TeacherRead(Exception):
    pass


class _Unread(Scores):
    """A teacher's scores that tell when anything of them is looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise _TeacherRead


def reads_teacher(term: Term, *, vocab: int = 8) -> bool:
    """Whether a term on scores looks at the teacher's; found by tracing it on a few positions, not by its class.

    vocab: how many ids the student scores, for terms that work with that many only.
    """

    def trace(key: Any, local: Array, targets: Array) -> Array:
        parameters = term.parameters(key, student_embed=2, teacher_embed=2) if isinstance(term, Parameterized) else {}
        at = Positions(targets=targets, step=jnp.int32(0), one_to_one=targets == 0)
        return term(Scores(local), _Unread(local), at, parameters)

    scores, targets = (jax.ShapeDtypeStruct(*kind) for kind in (((2, vocab), jnp.float32), ((2,), jnp.int32)))
    try:
        jax.eval_shape(trace, jax.eval_shape(jax.random.key, 0), scores, targets)
    except _TeacherRead:
        return True
    return False


def check_terms_on_pairs(terms: Mapping[str, Any], *, vocab: int = 8) -> None:
    """Refuses terms that compare scores id by id, for a student whose tokenizer is not the teacher's."""
    on_scores = {
        name: term for name, term in terms.items() if isinstance(term, Term) and not isinstance(term, PairTerm)
    }
    wrong = {name: type(term).__name__ for name, term in on_scores.items() if reads_teacher(term, vocab=vocab)}
    if wrong:
        raise ValueError(
            f"the terms {wrong} read the teacher's scores of the student's ids; on two tokenizations of a text there "
            "are none. Allowed are terms on the student's scores alone, such as CrossEntropy, and ALM, HiddenMatch, "
            "ULD, MinED and DSKD; or give the student the teacher's tokenizer."
        )


def _path(values: Mapping[str, Array], name: str, chunks: Array, segment_ids: Array) -> Path:
    likelihood = -values[_LIKELIHOOD]
    ends = values.get(_ENDS + name, jnp.zeros_like(likelihood))
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
