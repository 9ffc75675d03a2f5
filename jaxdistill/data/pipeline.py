"""From a data config to batches: the loader that a training run draws from, and its exact state."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import weakref
from collections.abc import Iterable
from typing import Any

from jaxdistill.align import Chunks
from jaxdistill.choices import check_choices
from jaxdistill.data.packing import LongDocuments, RowKind, Statistics
from jaxdistill.data.paths import source_at
from jaxdistill.data.shards import DocumentStreams, RowSettings, VirtualShard, documents_and_rows
from jaxdistill.data.sources import ArrayRecord, Concatenated, JsonLines, Parquet, PlainText
from jaxdistill.data.tfds_source import Tfds, TfdsDirectory
from jaxdistill.data.tokenize import TEMPLATE_DATE, appends_eos
from jaxdistill.tokenizers.base import Tokenizer

AnySource = JsonLines | PlainText | Parquet | ArrayRecord | Concatenated | Tfds | TfdsDirectory

STATE_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A source of a mixture; `weight` is its share of the documents drawn, relative to the other weights."""

    source: AnySource
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}; give a positive number, or leave the source out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run trains on and how text becomes batches. Give `path`, or `sources`."""

    path: str | None = None
    """A .jsonl, .txt, .parquet or .array_record file, a directory of them, or a TFDS directory."""
    field: str = "text"
    """The key or column of the text, for `path`."""
    split: str = "train"
    """The split, where `path` is a TFDS directory."""
    sources: tuple[Weighted, ...] = ()
    """A mixture, instead of `path`; each source is reshuffled every epoch."""
    length: int = 512
    """Positions in a row."""
    teacher_length: int | None = None
    """Positions in a teacher's row, where the teacher has a tokenizer of its own. None: as many as `length`."""
    chunks: Chunks = "minimal"
    """What two tokenizers are compared on: runs of tokens that end at the same byte, or those merged to whole words."""
    batch_size: int = 8
    """Rows in a global batch."""
    virtual_shards: int | None = None
    """Independent streams of documents; a divisor of batch_size and a multiple of the number of processes. None: the
    largest divisor of batch_size up to 64. Runs resume on any number of processes that divides it."""
    seed: int = 0
    long_documents: LongDocuments = "split"
    """What happens to a document longer than a row: consecutive segments, the beginning only, or nothing of it."""
    append_eos: bool | None = None
    """End plain documents and completions with the end-of-sequence token. None: if the tokenizer has one."""
    prepend_bos: bool = False
    """Begin plain documents and prompts with the beginning-of-sequence token."""
    template_date: str = TEMPLATE_DATE.isoformat()
    """The day (YYYY-MM-DD) that chat templates are told it is, where they write the current date."""
    pack: bool = True
    """Put several documents into a row, each its own segment."""
    open_rows: int = 4
    """Rows that packing keeps open to fill; more waste less padding and hold more documents back."""
    prefetch_batches: int = 2
    """Batches made ahead, in a thread."""

    def __post_init__(self):
        check_choices(self)
        for name in ("length", "teacher_length", "batch_size", "open_rows", "prefetch_batches"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"DataConfig.{name} is {given}; it must be at least 1.")
        if self.path is not None and self.sources:
            raise ValueError("DataConfig.path and DataConfig.sources are both given; give one of them.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"DataConfig.seed is {self.seed}; it must be between 0 and 2^32 - 1.")
        try:
            datetime.date.fromisoformat(self.template_date)
        except ValueError:
            raise ValueError(f"DataConfig.template_date is {self.template_date!r}; give a day as YYYY-MM-DD.") from None
        if self.virtual_shards is not None and (self.virtual_shards < 1 or self.batch_size % self.virtual_shards):
            raise ValueError(
                f"DataConfig.virtual_shards is {self.virtual_shards}, which does not divide batch_size "
                f"{self.batch_size}. Allowed are {_divisors(self.batch_size)}; leave it out for "
                f"{_largest_divisor(self.batch_size)}."
            )

    @property
    def shards(self) -> int:
        """The number of virtual shards, resolved."""
        return self.virtual_shards if self.virtual_shards is not None else _largest_divisor(self.batch_size)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _largest_divisor(number: int) -> int:
    return max(divisor for divisor in _divisors(number) if divisor <= 64)


def make_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    teacher_tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Opens the data and returns this process's part of the batches, from the beginning.

    Concatenated in the order of processes, the parts are the global batch, whatever the number of processes. With a
    `teacher_tokenizer` the same documents are given in both tokenizations, with their chunks (`data.aligned_rows`):
    a batch has besides the student's fields "chunks", int32 [rows, length], and "teacher", the same fields of the
    teacher's rows. Raises `DataError` for unusable data and `ValueError` for a number of processes that does not divide
    the virtual shards.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index} of {process_count} processes; it counts from 0.")
    if config.shards % process_count:
        raise ValueError(
            f"{process_count} processes do not divide {config.shards} virtual shards (batch_size "
            f"{config.batch_size}). Legal numbers of processes are {_divisors(config.shards)}; or set virtual_shards "
            "to a multiple of the processes that divides batch_size."
        )
    if config.path is not None:
        mixture = (Weighted(source_at(config.path, field=config.field, split=config.split)),)
    elif config.sources:
        mixture = config.sources
    else:
        raise ValueError("no data: give DataConfig.path (a file or directory) or DataConfig.sources.")
    append_eos = appends_eos(config.append_eos, tokenizer, teacher_tokenizer)
    tokenize, kind = documents_and_rows(
        tokenizer,
        teacher_tokenizer,
        length=config.length,
        teacher_length=config.teacher_length,
        chunks=config.chunks,
        prepend_bos=config.prepend_bos,
        append_eos=append_eos,
        date=datetime.date.fromisoformat(config.template_date),
    )
    opened = [(part.source.open(), part.source.field) for part in mixture]
    streams = DocumentStreams(opened, [part.weight for part in mixture], virtual_shards=config.shards, seed=config.seed)
    settings = RowSettings(
        kind=kind, long_documents=config.long_documents, pack=config.pack, open_rows=config.open_rows
    )
    share = config.shards // process_count
    shards = [
        VirtualShard(index, streams, tokenize, settings)
        for index in range(process_index * share, (process_index + 1) * share)
    ]
    decided = ("length", "batch_size", "seed", "long_documents", "prepend_bos", "template_date", "pack", "open_rows")
    fingerprint = {name: getattr(config, name) for name in decided} | {
        "virtual_shards": config.shards,
        "append_eos": append_eos,
        "tokenizer": tokenizer.fingerprint,
        "chat_template": _template_hash(tokenizer),
        "data": [[records.fingerprint, part.weight] for (records, _), part in zip(opened, mixture, strict=True)],
    }
    if teacher_tokenizer is not None:
        fingerprint |= {
            "teacher_length": config.teacher_length or config.length,
            "chunks": config.chunks,
            "teacher_tokenizer": teacher_tokenizer.fingerprint,
            "teacher_chat_template": _template_hash(teacher_tokenizer),
        }
    first = process_index * share
    return Loader(shards, first, config, kind, fingerprint)


def _template_hash(tokenizer: Tokenizer) -> str:
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16]


class Loader:
    """Endless batches of this process's rows, made ahead in a thread, with the state of what was given out.

    A batch is a dict of the fields of `types.Batch` as NumPy arrays [rows, length]. Make one with `make_loader`, which
    says what else it holds with two tokenizers.
    """

    def __init__(
        self,
        shards: list[VirtualShard],
        first: int,
        config: DataConfig,
        kind: RowKind,
        fingerprint: dict[str, Any],
    ):
        from jaxdistill.data.batches import ShardBatches, prefetched

        rows_per_shard = config.batch_size // config.shards
        dataset = ShardBatches(shards, rows_per_shard=rows_per_shard, kind=kind)
        self._names = [str(first + index) for index in range(len(shards))]
        self._fingerprint, self._batches = fingerprint, 0
        self._nothing: Statistics = kind.nothing
        self.empty: dict[str, Any] = kind.arrays([[]] * rows_per_shard * len(shards))
        """A batch of padding alone."""
        self._held = [prefetched(dataset, config.prefetch_batches)]
        self._failure: Exception | None = None
        # Without this the thread of a loader that is no longer used would wait for ever; at the interpreter's exit
        # the iterator must be gone before Grain's modules are, which its own destructor needs.
        weakref.finalize(self, _close, self._held)

    @property
    def _iterator(self) -> Any:
        return self._held[0]

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._failure is not None:
            raise self._failure
        try:
            batch = next(self._iterator)
        except Exception as error:
            # Shards before the failing one are a batch ahead of the others now: there is no going on.
            self._failure = error
            raise
        self._batches += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where this process is after the last batch it gave out, as JSON; `merge_states` joins those of all."""
        places = self._iterator.get_state()["shards"]
        return {
            "format": STATE_FORMAT,
            "batches": self._batches,
            "fingerprint": self._fingerprint,
            "shards": dict(zip(self._names, places, strict=True)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the last batch of a state, whichever number of processes saved it.

        state: that of all processes (`merge_states`). Refused, with nothing changed, if the config, tokenizer or data
        differ from the saved ones or a virtual shard of this process is missing.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"data state has format {state.get('format')!r}; this version reads {STATE_FORMAT}.")
        differences = [
            f"{name}: saved {state['fingerprint'].get(name)!r}, now {self._fingerprint.get(name)!r}"
            for name in sorted({*state["fingerprint"], *self._fingerprint})
            if state["fingerprint"].get(name) != self._fingerprint.get(name)
        ]
        if differences:
            raise ValueError(
                "the data state belongs to other data or settings, so its order cannot be continued:\n  "
                + "\n  ".join(differences)
                + "\nRestore these, or start the data anew without a state."
            )
        missing = [name for name in self._names if name not in state["shards"]]
        if missing:
            raise ValueError(
                f"the data state lacks virtual shards {', '.join(missing)} of this process; it has "
                f"{', '.join(sorted(state['shards'], key=int))}. Join the states of all processes with `merge_states`."
            )
        self._iterator.set_state({"shards": [state["shards"][name] for name in self._names]})
        self._batches, self._failure = state["batches"], None

    @property
    def statistics(self) -> Statistics:
        """What became of this process's documents, up to the last batch it gave out."""
        places = self._iterator.get_state()["shards"]
        return sum((type(self._nothing)(**place["statistics"]) for place in places), self._nothing)

    def close(self) -> None:
        """Stops the thread; the loader gives nothing out any more."""
        self._iterator.close()


def _close(held: list[Any]) -> None:
    while held:
        held.pop().close()


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The states of all processes after the same batch as one, which any number of processes restores."""
    states = list(states)
    first = states[0]
    for state in states[1:]:
        for name in ("format", "batches", "fingerprint"):
            if state[name] != first[name]:
                raise ValueError(
                    f"the data states of two processes differ in {name}: {first[name]!r} and {state[name]!r}. "
                    "Take them after the same batch of the same run."
                )
    shards = {name: shard for state in states for name, shard in state["shards"].items()}
    return first | {"shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}
