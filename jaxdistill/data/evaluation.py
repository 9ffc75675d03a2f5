"""Finite batches for held-out evaluation: every document once, in fixed shapes, with exact byte counts."""

from __future__ import annotations

import datetime
import itertools
import operator
from collections.abc import Sequence
from typing import Any

from jaxdistill.align import Chunks
from jaxdistill.data.packing import FirstFit, RowKind
from jaxdistill.data.shards import documents_and_rows
from jaxdistill.data.sources import Record, Source
from jaxdistill.data.tokenize import TEMPLATE_DATE
from jaxdistill.tokenizers.base import Tokenizer

_DOCUMENTS_AT_ONCE = 256


def eval_batches(
    data: Source | Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch_size: int,
    windows_per_document: int | None = None,
    max_windows: int | None = None,
    pack: bool = True,
    prepend_bos: bool = False,
    append_eos: bool = False,
    date: datetime.date = TEMPLATE_DATE,
    teacher_tokenizer: Tokenizer | None = None,
    teacher_length: int | None = None,
    chunks: Chunks = "minimal",
) -> list[dict[str, Any]]:
    """All documents as batches of NumPy arrays [batch_size, rows' length], deterministic, the last filled with padding.

    A document is cut into consecutive windows of `length` predictions, each seen without what comes before it; the
    first `windows_per_document` are kept (None: all), and of these the first `max_windows` of the text. Packed, every
    batch has the one shape [batch_size, length]; with one window per row (`pack=False`), rows have length / 4,
    length / 2 or length (rounded up), shortest first.

    Without `prepend_bos` the first token of a document is predicted by nothing and is not evaluated: the sum of
    `target_bytes` is the documents' bytes less those of their first tokens (and of windows left out). The end token is
    left out by default, since it stands for no bytes and would add to bits per byte. date: the day that chat templates
    are told it is.

    With a `teacher_tokenizer` batches are those of pairs of rows (`data.aligned_rows`), with `teacher_length` positions
    on the teacher's side (None: `length`). Windows end where a chunk does, and all but the first of a document begin
    with the chunk before them.
    """
    for name, value in (
        ("length", length),
        ("teacher_length", teacher_length),
        ("batch_size", batch_size),
        ("windows_per_document", windows_per_document),
        ("max_windows", max_windows),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    tokenize, kind = documents_and_rows(
        tokenizer,
        teacher_tokenizer,
        length=length,
        teacher_length=teacher_length,
        chunks=chunks,
        prepend_bos=prepend_bos,
        append_eos=append_eos,
        date=date,
    )
    windows: list[Any] = []
    for records, field in _read(data):
        for document in tokenize(records, [field] * len(records)):
            windows += kind.cut(document, long_documents="split")[0][:windows_per_document]
        if max_windows is not None and len(windows) >= max_windows:
            windows = windows[:max_windows]
            break
    if not windows:
        raise ValueError("no document has anything to predict: each is empty, a single token, or unsupervised.")
    sized = [(kind, _packed(windows, kind))] if pack else _by_length(windows, kind)
    return [
        kind.arrays(list(rows) + [[]] * (batch_size - len(rows)))
        for kind, all_rows in sized
        for rows in (all_rows[start : start + batch_size] for start in range(0, len(all_rows), batch_size))
    ]


def _read(data: Source | Sequence[str]):
    """Records some at a time, with the field of their text."""
    if isinstance(data, Sequence):
        records: Sequence[Record] = [{"text": text} for text in data]
        field = "text"
    else:
        records, field = data.open(), data.field  # pyright: ignore[reportAssignmentType]
    for start in range(0, len(records), _DOCUMENTS_AT_ONCE):
        stop = min(start + _DOCUMENTS_AT_ONCE, len(records))
        yield [records[index] for index in range(start, stop)], field


def _packed(windows: list[Any], kind: RowKind) -> list[list]:
    """All windows, longest first into the first row with room."""
    packer = FirstFit(length=kind.lengths, open_rows=len(windows))
    longest_first = sorted(windows, key=lambda window: window.sizes, reverse=True)
    finished = list(itertools.chain.from_iterable(packer.add(window) for window in longest_first))
    return finished + packer.rows


def _by_length(windows: list[Any], kind: RowKind) -> list[tuple[RowKind, list[list]]]:
    """One window per row, grouped by the shortest of three row lengths that holds it."""
    kinds = [kind.shortened(4), kind.shortened(2), kind]
    rows: list[list[list]] = [[] for _ in kinds]
    for window in windows:
        fits = (all(map(operator.le, window.sizes, each.lengths)) for each in kinds)
        rows[list(fits).index(True)].append([window])
    return [(each, some) for each, some in zip(kinds, rows, strict=True) if some]
