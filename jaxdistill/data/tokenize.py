"""Raw records to token sequences that know which tokens are supervised and how many bytes each stands for."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
from collections.abc import Iterator, Sequence

import numpy as np

from jaxdistill.data.chat import ChatFormat, check_messages
from jaxdistill.data.sources import CONVERSATION, PAIR, DataError, Record
from jaxdistill.tokenizers.base import Encoding, Tokenizer

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What data says where a chat template asks for today's date: one day for ever, so that the same file is the same data
whenever it is read. It is the one that Llama 3.1's template writes where it cannot ask."""


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """One document as tokens, before it is cut and packed.

    ids: int32 [n]. supervised: bool [n], whether token i is to be predicted (the first never is: nothing precedes it).
    text_bytes: int32 [n], the bytes of the original text that token i stands for; 0 for tokens that were added.
    """

    ids: np.ndarray
    supervised: np.ndarray
    text_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def appends_eos(choice: bool | None, *tokenizers: Tokenizer | None) -> bool:
    """Whether plain texts get an end-of-text token: as chosen, or else where any of the tokenizers has one."""
    if choice is not None:
        return choice
    return any(tokenizer is not None and tokenizer.special.eos is not None for tokenizer in tokenizers)


class DocumentTokenizer:
    """Turns records into `Tokenized` documents.

    prepend_bos, append_eos: added around plain documents and pairs (a chat template writes its own); the final
    end-of-sequence token is supervised. Texts are encoded as text: strings that look like special tokens are not.
    date: the day that chat templates are told it is.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prepend_bos: bool, append_eos: bool, date: datetime.date = TEMPLATE_DATE
    ):
        for wanted, role, token in (
            (prepend_bos, "prepend_bos", tokenizer.special.bos),
            (append_eos, "append_eos", tokenizer.special.eos),
        ):
            if wanted and token is None:
                raise ValueError(f"{role} is set and the tokenizer has no such token; unset it.")
        self.tokenizer = tokenizer
        self._bos = tokenizer.special.bos if prepend_bos else None
        self._eos = tokenizer.special.eos if append_eos else None
        self._date = date

    @functools.cached_property
    def chat(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, date=self._date)

    def __call__(self, records: Sequence[Record], fields: Sequence[str]) -> list[Tokenized]:
        """Each record as a document, in order; `fields[i]` is where record i keeps plain text."""
        plain = [i for i, record in enumerate(records) if CONVERSATION not in record and not is_pair(record)]
        encodings = self.tokenizer.encode_batch([records[i][fields[i]] for i in plain])
        texts = dict(zip(plain, encodings, strict=True))
        return [
            self._framed([(texts[i], True)]) if i in texts else self._structured(record)
            for i, record in enumerate(records)
        ]

    def _structured(self, record: Record) -> Tokenized:
        with naming(record):
            return self._pair(record) if is_pair(record) else self._chat(record)

    def _pair(self, record: Record) -> Tokenized:
        """The prompt and the completion are encoded apart, so that no token straddles them."""
        for key in PAIR:
            if not isinstance(record[key], str):
                raise DataError(
                    f"{key!r} holds {type(record[key]).__name__}, not text. Give texts, or the whole conversation as "
                    "'messages'."
                )
        prompt, completion = self.tokenizer.encode_batch([record[key] for key in PAIR])
        if not len(prompt.ids) and self._bos is None:
            raise DataError(
                "a record has an empty 'prompt', so nothing precedes the first token of its completion. Give a "
                "prompt, or begin texts with a token (prepend_bos, where every tokenizer has one)."
            )
        if not len(completion.ids):
            raise DataError("a record has an empty 'completion'; give at least one character, or remove the record.")
        return self._framed([(prompt, False), (completion, True)])

    def _chat(self, record: Record) -> Tokenized:
        return Tokenized(*self.chat.supervise(check_messages(record[CONVERSATION])))

    def _framed(self, parts: list[tuple[Encoding, bool]]) -> Tokenized:
        """Parts in a row, each supervised or not, between the tokens that frame a document."""
        count = sum(len(encoding.ids) for encoding, _ in parts)
        bos, eos = (self._bos, self._eos) if count else (None, None)
        front = int(bos is not None)
        ids = np.zeros(front + count + int(eos is not None), np.int32)
        supervised, text_bytes = np.zeros(len(ids), bool), np.zeros(len(ids), np.int32)
        at = front
        for encoding, wanted in parts:
            span = slice(at, at + len(encoding.ids))
            ids[span], supervised[span] = encoding.ids, wanted
            text_bytes[span] = encoding.offsets[:, 1] - encoding.offsets[:, 0]
            at = span.stop
        if bos is not None:
            ids[0] = bos
        if eos is not None:
            ids[-1], supervised[-1] = eos, True
        return Tokenized(ids, supervised, text_bytes)


def is_pair(record: Record) -> bool:
    """Whether a record is a prompt and its completion."""
    return CONVERSATION not in record and all(key in record for key in PAIR)


@contextlib.contextmanager
def naming(record: Record) -> Iterator[None]:
    """Adds the beginning of the record to an error about it."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{error} The record begins: {json.dumps(record, ensure_ascii=False)[:120]}") from None
