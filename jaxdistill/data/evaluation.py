"""Finite batches for held-out evaluation: every document once, in fixed shapes, with exact byte counts."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence

import numpy as np

from jaxdistill.data.packing import FirstFit, Piece, Row, cut, to_arrays
from jaxdistill.data.sources import Record, Source
from jaxdistill.data.tokenize import TEMPLATE_DATE, DocumentTokenizer
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
) -> list[dict[str, np.ndarray]]:
    """All documents as batches of NumPy arrays [batch_size, rows' length], deterministic, the last filled with padding.

    A document is cut into consecutive windows of `length` predictions, each seen without what comes before it; the
    first `windows_per_document` are kept (None: all), and of these the first `max_windows` of the text. Packed, every
    batch has the one shape [batch_size, length]; with one window per row (`pack=False`), rows have length / 4,
    length / 2 or length (rounded up), shortest first.

    Without `prepend_bos` the first token of a document is predicted by nothing and is not evaluated: the sum of
    `target_bytes` is the documents' bytes less those of their first tokens (and of windows left out). The end token is
    left out by default, since it stands for no bytes and would add to bits per byte. date: the day that chat templates
    are told it is.
    """
    for name, value in (
        ("length", length),
        ("batch_size", batch_size),
        ("windows_per_document", windows_per_document),
        ("max_windows", max_windows),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    tokenize = DocumentTokenizer(tokenizer, prepend_bos=prepend_bos, append_eos=append_eos, date=date)
    windows: list[Piece] = []
    for records, field in _chunks(data):
        for document in tokenize(records, [field] * len(records)):
            windows += cut(document, length=length, long_documents="split")[0][:windows_per_document]
        if max_windows is not None and len(windows) >= max_windows:
            windows = windows[:max_windows]
            break
    if not windows:
        raise ValueError("no document has anything to predict: each is empty, a single token, or unsupervised.")
    shapes = {length: _packed(windows, length)} if pack else _by_length(windows, length)
    return [
        to_arrays(list(rows) + [[]] * (batch_size - len(rows)), size)
        for size, all_rows in shapes.items()
        for rows in (all_rows[start : start + batch_size] for start in range(0, len(all_rows), batch_size))
    ]


def _chunks(data: Source | Sequence[str]):
    """Records some at a time, with the field of their text."""
    if isinstance(data, Sequence):
        records: Sequence[Record] = [{"text": text} for text in data]
        field = "text"
    else:
        records, field = data.open(), data.field  # pyright: ignore[reportAssignmentType]
    for start in range(0, len(records), _DOCUMENTS_AT_ONCE):
        stop = min(start + _DOCUMENTS_AT_ONCE, len(records))
        yield [records[index] for index in range(start, stop)], field


def _packed(windows: list[Piece], length: int) -> list[Row]:
    """All windows, longest first into the first row with room."""
    packer = FirstFit(length=length, open_rows=len(windows))
    longest_first = sorted(windows, key=len, reverse=True)
    finished = list(itertools.chain.from_iterable(packer.add(window) for window in longest_first))
    return finished + packer.rows


def _by_length(windows: list[Piece], length: int) -> dict[int, list[Row]]:
    """One window per row, grouped by the shortest of three row lengths that holds it."""
    sizes = sorted({-(-length // 4), -(-length // 2), length})
    shapes: dict[int, list[Row]] = {size: [] for size in sizes}
    for window in windows:
        shapes[next(size for size in sizes if len(window) <= size)].append([window])
    return {size: rows for size, rows in shapes.items() if rows}
