"""Virtual shards: each has its own document order and packing, and feeds fixed rows of every global batch.

Which process computes a shard does not change what it holds, so any number of processes gives the same global batches.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdistill.align import Chunks
from jaxdistill.data.aligned import AlignedTokenizer
from jaxdistill.data.aligned_rows import AlignedRows
from jaxdistill.data.packing import FirstFit, LongDocuments, RowKind, Rows
from jaxdistill.data.permutation import permuted
from jaxdistill.data.sources import Record, Records
from jaxdistill.data.tokenize import DocumentTokenizer
from jaxdistill.tokenizers.base import Tokenizer

# 2^64 divided by the golden ratio: multiples of it fill the circle as evenly as any sequence can.
_GOLDEN_STEP = 0x9E3779B97F4A7C15
_CIRCLE = 1 << 64
# Documents tokenized at once by all shards together, and by one at least: enough to keep a few cores busy.
_TOGETHER, _AT_LEAST = 256, 16


class DocumentStreams:
    """Endless shuffled streams, one for each source, dealt out to the virtual shards like cards.

    Each epoch of a source is one permutation of the whole (computed, so nothing is held in memory); shard v of V takes
    its positions v, v + V, v + 2V, ... So every document belongs to one shard per epoch, to another in the next, and
    with fewer documents than shards a shard simply meets a document in some epochs only.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Records, str]],
        weights: Sequence[float],
        *,
        virtual_shards: int,
        seed: int,
    ):
        self._sources, self.virtual_shards, self._seed = sources, virtual_shards, seed
        starts = [np.random.SeedSequence([seed, shard]).generate_state(1, np.uint64) for shard in range(virtual_shards)]
        self._starts = [int(start[0]) for start in starts]
        self.documents = sum(len(records) for records, _ in sources)
        total = sum(weights)
        self._bounds = [int(bound / total * _CIRCLE) for bound in itertools.accumulate(weights)]

    def __len__(self) -> int:
        return len(self._sources)

    def source_of(self, shard: int, draw: int) -> int:
        """Which source a shard's draw comes from: shares follow the weights, evenly from the first draws on."""
        point = (self._starts[shard] + draw * _GOLDEN_STEP) % _CIRCLE
        return next((source for source, bound in enumerate(self._bounds) if point < bound), len(self) - 1)

    def record(self, shard: int, source: int, taken: int) -> tuple[Record, str]:
        """The document that a shard takes as number `taken` of a source, and the field of its text."""
        records, field = self._sources[source]
        epoch, place = divmod(shard + taken * self.virtual_shards, len(records))
        return records[permuted(place, len(records), (self._seed, source, epoch))], field


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How documents become rows."""

    kind: RowKind
    long_documents: LongDocuments
    pack: bool
    open_rows: int


Tokenize = Callable[[Sequence[Record], Sequence[str]], list[Any]]
"""Records, and the field of each one's text, to documents of the kind that `RowSettings.kind` cuts."""


def documents_and_rows(
    tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer | None,
    *,
    length: int,
    teacher_length: int | None,
    chunks: Chunks,
    prepend_bos: bool,
    append_eos: bool,
    date: datetime.date,
) -> tuple[Tokenize, RowKind]:
    """How records become documents, and documents rows, with one tokenizer or with two."""
    if teacher_tokenizer is None:
        return DocumentTokenizer(tokenizer, prepend_bos=prepend_bos, append_eos=append_eos, date=date), Rows(length)
    tokenize = AlignedTokenizer(
        tokenizer, teacher_tokenizer, prepend_bos=prepend_bos, append_eos=append_eos, date=date, chunks=chunks
    )
    return tokenize, AlignedRows(length, teacher_length or length)


class VirtualShard:
    """One shard's place in its documents, its open rows, and the rows that are ready.

    A state holds names of documents, not tokens: how many were taken of each source, and the pieces of open and ready
    rows as (source, number taken, start, stop).
    """

    def __init__(self, index: int, streams: DocumentStreams, tokenize: Tokenize, settings: RowSettings):
        self._index, self._streams, self._tokenize, self._settings = index, streams, tokenize, settings
        self._packed = [0] * len(streams)
        self._ahead: collections.deque[tuple[int, int, Any]] = collections.deque()
        self._packer = self._new_packer([])
        self._ready: collections.deque[list] = collections.deque()
        self.statistics = settings.kind.nothing

    def next_row(self) -> list:
        """The next row of this shard."""
        fruitless = 0
        while not self._ready:
            fruitless = 0 if self._take() else fruitless + 1
            if fruitless > self._streams.documents + 1000:
                raise ValueError(
                    f"{fruitless} documents in a row gave nothing to learn from (shard {self._index}: "
                    f"{self.statistics}). Give longer texts, conversations with an assistant's turn, or other than "
                    "'drop' for documents longer than `length`."
                )
        row = self._ready.popleft()
        self.statistics += self._settings.kind.count(row)
        return row

    def state(self) -> dict[str, Any]:
        """Where this shard is, as JSON."""

        def names(rows):
            return [[[*piece.origin, piece.start, piece.stop] for piece in row] for row in rows]

        return {
            "taken": list(self._packed),
            "open": names(self._packer.rows),
            "ready": names(self._ready),
            "statistics": dict(vars(self.statistics)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where a state says; documents of unfinished rows are read and tokenized again."""
        rows = [*state["open"], *state["ready"]]
        names = sorted({(source, taken) for row in rows for source, taken, _, _ in row})
        documents, piece = dict(zip(names, self._documents(names), strict=True)), self._settings.kind.piece

        def pieces(rows):
            return [[piece(documents[s, taken], start, stop, (s, taken)) for s, taken, start, stop in r] for r in rows]

        self._packed = list(state["taken"])
        self._ahead.clear()
        self._packer = self._new_packer(pieces(state["open"]))
        self._ready = collections.deque(pieces(state["ready"]))
        self.statistics = type(self._settings.kind.nothing)(**state["statistics"])

    def _new_packer(self, rows: list[list]) -> FirstFit:
        return FirstFit(length=self._settings.kind.lengths, open_rows=self._settings.open_rows, rows=rows)

    def _documents(self, names: Sequence[tuple[int, int]]) -> list[Any]:
        read = [self._streams.record(self._index, source, taken) for source, taken in names]
        return self._tokenize([record for record, _ in read], [field for _, field in read])

    def _look_ahead(self) -> None:
        """Tokenizes the next documents together. They are not part of the state until they are packed."""
        count = max(_AT_LEAST, _TOGETHER // self._streams.virtual_shards)
        taken, names = list(self._packed), []
        for draw in range(sum(taken), sum(taken) + count):
            source = self._streams.source_of(self._index, draw)
            names.append((source, taken[source]))
            taken[source] += 1
        documents = self._documents(names)
        self._ahead.extend((*name, document) for name, document in zip(names, documents, strict=True))

    def _take(self) -> bool:
        """Packs one more document; False if there was nothing in it."""
        if not self._ahead:
            self._look_ahead()
        source, taken, document = self._ahead.popleft()
        self._packed[source] += 1
        pieces, counted = self._settings.kind.cut(
            document, long_documents=self._settings.long_documents, origin=(source, taken)
        )
        self.statistics += counted
        for piece in pieces:
            self._ready.extend(self._packer.add(piece) if self._settings.pack else [[piece]])
        return bool(pieces)
