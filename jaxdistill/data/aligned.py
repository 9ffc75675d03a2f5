"""Documents of two tokenizers: the same record as tokens of the student and of the teacher, with their chunks.

The text that both have in common is that of a plain document, of a prompt and its completion, or the contents of a
conversation's messages, without the white space around them. Everything else (headers, what a template adds, tokens
that one side alone has) is in no chunk.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxdistill.align import Alignment, Chunks, Placed, align, boundary_mask
from jaxdistill.data.chat import Located, check_messages
from jaxdistill.data.sources import CONVERSATION, PAIR, Record
from jaxdistill.data.tokenize import TEMPLATE_DATE, DocumentTokenizer, Tokenized, is_pair, naming
from jaxdistill.tokenizers.base import Tokenizer


def following_ids(tokenizer: Tokenizer, white_space: Iterable[str]) -> np.ndarray:
    """The ids that can follow the end of a word, bool [vocab]: such as begin with `white_space`, and special tokens."""
    return boundary_mask(
        tokenizer.token_bytes(), tokenizer.special.all.values(), white_space=[each.encode() for each in white_space]
    )


class Units(NamedTuple):
    """How one side's tokens are split between chunks: a unit is a chunk with what is in no chunk before it; what
    follows the last chunk on either side is a unit of its own.

    firsts: int64 [chunks], the first token of each chunk. lasts: int64 [units], the last token of each unit. reach:
    int64 [units], where a piece that ends with a unit stops: after the position of its last token, if that one
    predicts anything.
    """

    firsts: np.ndarray
    lasts: np.ndarray
    reach: np.ndarray

    def begin(self, start: int) -> int:
        """The first token of a piece whose first supervised unit is `start`: the whole chunk before goes with it."""
        return int(self.firsts[start - 1]) if start else 0


@dataclasses.dataclass(frozen=True)
class AlignedDocument:
    """One document in two tokenizations, before it is cut and packed.

    alignment: the chunk of each token, int32 [n] on each side; 0 is none, they count from 1. supervised: bool [chunks],
    whether a chunk is to be compared: every one of its tokens, on both sides, is supervised, has something before it
    that predicts it, and holds nothing but text that both sides have.
    """

    student: Tokenized
    teacher: Tokenized
    alignment: Alignment
    supervised: np.ndarray

    @property
    def sides(self) -> tuple[tuple[Tokenized, np.ndarray], ...]:
        """Tokens and their chunks: the student's, the teacher's."""
        return (self.student, self.alignment.student), (self.teacher, self.alignment.teacher)

    @functools.cached_property
    def units(self) -> list[Units]:
        """Units of both sides, equally many."""
        numbers = np.arange(1, len(self.supervised) + 1)
        found = []
        for tokens, chunks in self.sides:
            index = np.flatnonzero(chunks)
            bounds = [np.searchsorted(chunks[index], numbers, side=side) for side in ("left", "right")]
            found.append((index[bounds[0]], index[bounds[1] - 1], len(tokens)))
        rest = any(count > (lasts[-1] + 1 if len(lasts) else 0) for _, lasts, count in found)
        return [
            Units(firsts, ends, np.maximum(np.minimum(ends + 1, count - 1), 0))
            for firsts, lasts, count in found
            for ends in (np.append(lasts, [count - 1] * rest).astype(np.int64),)
        ]


class _Side(NamedTuple):
    """One side of a document before alignment. clean: bool [n], False for tokens that also hold other text."""

    document: Tokenized
    placed: Placed
    clean: np.ndarray


class AlignedTokenizer:
    """Turns records into `AlignedDocument`s.

    prepend_bos, append_eos: added around plain documents and pairs on each side whose tokenizer has the token; one of
    them must. A token that both sides add is a chunk. One that one side alone adds is in no chunk and is predicted and
    supervised on its side only; where one side alone begins with a token, nothing predicts the first token of the
    other, so the first chunk is not supervised. Conversations go through each side's own chat template; the token that
    ends an assistant's turn is a chunk where both templates have one. date: the day that templates are told it is.
    """

    def __init__(
        self,
        student: Tokenizer,
        teacher: Tokenizer,
        *,
        prepend_bos: bool,
        append_eos: bool,
        date: datetime.date = TEMPLATE_DATE,
        chunks: Chunks = "minimal",
    ):
        bos, eos = ([getattr(each.special, role) for each in (student, teacher)] for role in ("bos", "eos"))
        for wanted, role, tokens in ((prepend_bos, "prepend_bos", bos), (append_eos, "append_eos", eos)):
            if wanted and tokens == [None, None]:
                raise ValueError(f"{role} is set and neither tokenizer has such a token; unset it.")
        self._chunks: Chunks = chunks
        self._prepends = [prepend_bos and token is not None for token in bos]
        self._appends = [append_eos and token is not None for token in eos]
        self._sides = [
            DocumentTokenizer(tokenizer, prepend_bos=prepends, append_eos=appends, date=date)
            for tokenizer, prepends, appends in zip((student, teacher), self._prepends, self._appends, strict=True)
        ]

    @functools.cached_property
    def _spaces(self) -> list[np.ndarray]:
        """For each side the ids that begin with white space."""
        return [boundary_mask(side.tokenizer.token_bytes(), ()) for side in self._sides]

    def __call__(self, records: Sequence[Record], fields: Sequence[str]) -> list[AlignedDocument]:
        """Each record as a document, in order; `fields[i]` is where record i keeps plain text."""
        if not records:
            return []
        chats = [CONVERSATION in record for record in records]
        framed = [index for index, chat in enumerate(chats) if not chat]
        found = [
            dict(zip(framed, side([records[i] for i in framed], [fields[i] for i in framed]), strict=True))
            for side in self._sides
        ]
        pairs = [
            self._chat(record) if chat else self._framed(record, fields[index], [each[index] for each in found])
            for index, (record, chat) in enumerate(zip(records, chats, strict=True))
        ]
        return _aligned(pairs, self._chunks)

    def _framed(self, record: Record, field: str, documents: Sequence[Tokenized]) -> list[_Side]:
        """A plain document, or a prompt and its completion, which are encoded apart."""
        keys = PAIR if is_pair(record) else (field,)
        parts = [len(record[key].encode()) for key in keys]
        both = all(map(len, documents))
        front, back = both and all(self._prepends), both and all(self._appends)
        stops = np.cumsum([int(front), *parts, int(back)])
        framed = []
        for side, document in enumerate(documents):
            ends, inside = np.cumsum(document.text_bytes, dtype=np.int64), np.ones(len(document), bool)
            if len(document):
                if len(parts) > 1:
                    # A lossy tokenizer may leave nothing of a prompt, whose bytes are passed all the same.
                    first = int(np.argmax(document.supervised))
                    ends[first:] += parts[0] - (ends[first - 1] if first else 0)
                ends += int(front)
                ends[-1] += int(back)
                inside[0] &= front or not self._prepends[side]
                inside[-1] &= back or not self._appends[side]
            framed.append(self._side(side, document, ends, inside, stops, clean=np.ones(len(document), bool)))
        return framed

    def _chat(self, record: Record) -> list[_Side]:
        """A conversation: contents of messages that both templates wrote, and ends of turns that both have."""
        with naming(record):
            messages = check_messages(record[CONVERSATION])
            chats = [side.chat.locate(messages) for side in self._sides]
        shared = _shared_messages(chats)
        spans, turn_ends = ([getattr(chat, name)[shared] for chat in chats] for name in ("contents", "turn_ends"))
        ended = (turn_ends[0] >= 0) & (turn_ends[1] >= 0)
        stops = np.cumsum(np.stack([spans[0][:, 1] - spans[0][:, 0], ended], axis=1))
        sides = []
        for side, chat in enumerate(chats):
            places, within = _content_bytes(chat.offsets, spans[side].reshape(-1))
            event = np.zeros(len(chat.ids), bool)
            event[turn_ends[side][ended]] = True
            widths, rendered = np.diff(places)[:, 0], np.diff(chat.offsets)[:, 0]
            document = Tokenized(chat.ids, chat.supervised, chat.text_bytes)
            inside = event | (widths > 0) | (within[:, 0] & (rendered == 0))
            ends = places[:, 1] + np.cumsum(event)
            sides.append(self._side(side, document, ends, inside, stops, clean=event | (widths == rendered)))
        return sides

    def _side(
        self,
        side: int,
        document: Tokenized,
        ends: np.ndarray,
        inside: np.ndarray,
        stops: np.ndarray,
        *,
        clean: np.ndarray,
    ) -> _Side:
        """stops: where texts and events end in the common coordinate, ascending."""
        opens = None
        if self._chunks == "words":
            part = np.searchsorted(stops, ends)
            opens = self._spaces[side][document.ids] | (np.diff(part, prepend=-1) > 0)
        return _Side(document, Placed(ends, inside, opens), clean)


def _shared_messages(chats: Sequence[Located]) -> np.ndarray:
    """The messages whose contents both templates wrote, in the same order: int64 [shared messages]."""
    shared, reached = [], np.zeros(2, np.int64)
    for index, spans in enumerate(np.stack([chat.contents for chat in chats], axis=1)):
        if (spans[:, 0] >= reached).all():
            shared.append(index)
            reached = spans[:, 1]
    return np.array(shared, np.int64)


def _content_bytes(offsets: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many bytes of contents lie before each place of a rendered text, and whether it is in one. borders: where
    contents start and end, in turn."""
    index = np.searchsorted(borders, offsets, side="right")
    passed = np.concatenate([np.zeros(1, np.int64), np.cumsum(borders[1::2] - borders[::2])])
    within = index % 2 == 1
    return passed[index // 2] + np.where(within, offsets - np.append(borders, 0)[index - 1], 0), within


def _aligned(pairs: Sequence[Sequence[_Side]], chunks: Chunks) -> list[AlignedDocument]:
    """Aligns all documents at once."""
    sides = [_joined([side.placed for side in each]) for each in zip(*pairs, strict=True)]
    alignment = align(*sides, chunks=chunks)
    parts = [
        np.split(ids, np.cumsum([len(each[number].document) for each in pairs])[:-1])
        for number, ids in enumerate(alignment)
    ]
    return [
        AlignedDocument(student.document, teacher.document, Alignment(*ids), _supervised((student, teacher), ids))
        for (student, teacher), *ids in zip(pairs, *parts, strict=True)
    ]


def _joined(texts: Sequence[Placed]) -> Placed:
    """Several texts one after the other."""
    ends, inside, opens, _ = zip(*texts, strict=True)
    return Placed(
        np.concatenate(ends),
        np.concatenate(inside),
        None if opens[0] is None else np.concatenate(opens),
        np.array([len(each) for each in ends]),
    )


def _supervised(sides: Sequence[_Side], ids: Sequence[np.ndarray]) -> np.ndarray:
    """Which chunks are to be compared, bool [chunks]."""
    whole = np.ones(1 + max(int(each.max(initial=0)) for each in ids), bool)
    for side, chunks in zip(sides, ids, strict=True):
        predicted = side.document.supervised & side.clean
        predicted[:1] = False
        whole[chunks[~predicted]] = False
    return whole[1:]
