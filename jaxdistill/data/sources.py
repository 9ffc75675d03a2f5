"""Where raw records come from: JSON Lines, plain text, Parquet and ArrayRecord files.

A source is a small frozen description of where records are; `open()` turns it into `Records`, a random-access
sequence of dicts. A record holds text under the source's `field`, or a conversation under "messages", or "prompt" and
"completion"; what is made of it is decided later (`data.tokenize`).
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxdistill.formats.paths import AnyPath, fetched

Record = dict[str, Any]

CONVERSATION = "messages"
PAIR = ("prompt", "completion")

_WHOLE_HASH_BYTES = 1 << 28
_SAMPLE_BYTES = 1 << 16
_SCAN_BYTES = 1 << 24
_ROW_GROUP_CACHE_BYTES = 1 << 31


class DataError(ValueError):
    """A data file that cannot be used as it is; the message says where the fault is and what to do."""


class Records(Protocol):
    """An open source: random access to records. `fingerprint` names the content, so that a resume can compare it."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Source(Protocol):
    """A description of where records are."""

    @property
    def field(self) -> str:
        """The key of a plain document's text."""
        ...

    def open(self) -> Records: ...


def check_record(record: Any, field: str, where: str) -> Record:
    """The record itself, when it holds a document, a conversation or a pair; else an error that lists its fields."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with named fields, found {type(record).__name__}.")
    if CONVERSATION in record or all(key in record for key in PAIR):
        return record
    if field not in record:
        raise DataError(
            f"{where}: no field {field!r}. Its fields are {sorted(record)}. Name the one that holds the text, or give "
            "'messages' (a conversation) or 'prompt' and 'completion'."
        )
    if not isinstance(record[field], str):
        raise DataError(
            f"{where}: field {field!r} holds {type(record[field]).__name__}, not text. Its fields are {sorted(record)}."
        )
    return record


def checked_file(path: AnyPath) -> Path:
    """The path of an existing file with at least one byte."""
    file = fetched(path)
    if not file.exists():
        raise DataError(f"{file}: there is no such file. Give the path of an existing one.")
    if file.is_dir():
        raise DataError(f"{file}: this is a directory; give a file, or use `open_path` for a directory of them.")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty. Give a file with at least one record.")
    return file


def content_fingerprint(files: Sequence[Path]) -> str:
    """A hash of content and sizes, whatever the paths and times; beyond 256 MiB of samples of each file."""
    digest = hashlib.sha256()
    sizes = [file.stat().st_size for file in files]
    sampled = sum(sizes) > _WHOLE_HASH_BYTES
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{size};".encode())
        with open(file, "rb") as stream:
            if not sampled:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for start in (0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _map_file(file: Path) -> mmap.mmap:
    with open(file, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _find_all(data: mmap.mmap, byte: int) -> np.ndarray:
    """Positions of one byte value, found block by block so that a large file is not copied."""
    found = []
    for start in range(0, len(data), _SCAN_BYTES):
        block = np.frombuffer(data[start : start + _SCAN_BYTES], np.uint8)
        found.append(np.flatnonzero(block == byte) + start)
    return np.concatenate(found)


def _decode(data: bytes, where: Callable[[int], str]) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where(error.start)} is not UTF-8 text (byte 0x{data[error.start]:02x}: {error.reason}). Convert the "
            "file to UTF-8, for example with `iconv -f ISO-8859-1 -t UTF-8`."
        ) from None


# ---------------------------------------------------------------------------------------------------- JSON Lines


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """One JSON object per line, memory-mapped. Blank lines are skipped.

    A line that is not UTF-8 or not JSON, or that lacks the text, is an error that names the line: at opening for the
    first record, and when it is read for the others.
    """

    path: str
    field: str = "text"

    def open(self) -> Records:
        return _JsonLineRecords(checked_file(self.path), self.field)


class _JsonLineRecords:
    def __init__(self, file: Path, field: str):
        self._file, self._field = file, field
        self._data = _map_file(file)
        ends = _find_all(self._data, ord("\n"))
        starts = np.concatenate([[0], ends + 1])
        ends = np.concatenate([ends, [len(self._data)]])
        # An object starts with "{": only lines that start otherwise can be blank, and few do.
        opens = np.frombuffer(self._data, np.uint8)[np.minimum(starts, len(self._data) - 1)] == ord("{")
        doubtful = np.flatnonzero(~opens | (starts == ends))
        blank = [line for line in doubtful if not self._data[starts[line] : ends[line]].strip()]
        kept = np.setdiff1d(np.arange(len(starts)), np.asarray(blank, np.int64))
        self._starts, self._ends, self._lines = starts[kept], ends[kept], kept
        if not len(self):
            raise DataError(f"{file}: the file has no records, only blank lines. Give a file with at least one.")
        self.fingerprint = f"jsonl:{field}:{len(self)}:{content_fingerprint([file])}"
        self[0]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        start, end, line = int(self._starts[index]), int(self._ends[index]), int(self._lines[index]) + 1
        where = f"{self._file}, line {line}"
        text = _decode(self._data[start:end], lambda at: f"{where}, byte {start + at} of the file,")
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON ({error.msg}, column {error.colno}). Every line must be one whole object."
            ) from None
        return check_record(record, self._field, where)


# ---------------------------------------------------------------------------------------------------- plain text


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A text file, cut into documents of at most `document_bytes` at blank lines (else at line ends).

    Cutting gives the shuffle something to shuffle and different rows to the virtual shards; `None` makes the whole
    file one document. Every byte belongs to exactly one document, in order. A line longer than `document_bytes` stays
    whole.
    """

    path: str
    document_bytes: int | None = 8192

    def __post_init__(self):
        if self.document_bytes is not None and self.document_bytes < 1:
            raise ValueError(f"document_bytes is {self.document_bytes}; give at least 1, or None for whole files.")

    @property
    def field(self) -> str:
        return "text"

    def open(self) -> Records:
        return _PlainTextRecords(checked_file(self.path), self.document_bytes)


_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


def _document_ends(data: mmap.mmap, document_bytes: int) -> Iterator[int]:
    """The end of each document: after the last blank line that fits, else the last line end, else the next one."""
    start = 0
    while start < len(data):
        end = start + document_bytes
        if end < len(data):
            window = data[start:end]
            blank = collections.deque(_BLANK_LINE.finditer(window), maxlen=1)
            line = window.rfind(b"\n")
            after = data.find(b"\n", end)
            if blank:
                end = start + blank[0].end()
            elif line >= 0:
                end = start + line + 1
            else:
                end = after + 1 if after >= 0 else len(data)
        start = min(end, len(data))
        yield start


class _PlainTextRecords:
    def __init__(self, file: Path, document_bytes: int | None):
        self._file = file
        with contextlib.closing(_map_file(file)) as data:
            ends = [len(data)] if document_bytes is None else list(_document_ends(data, document_bytes))
            self._bounds = np.asarray([0, *ends], np.int64)
            texts = (self._text(data[start:end], start) for start, end in itertools.pairwise(self._bounds.tolist()))
            # Every document is decoded once, so that a fault shows at opening and not hours later.
            if sum(bool(text.strip()) for text in texts) == 0:
                raise DataError(f"{file}: the file holds only white space. Give a file with text.")
        self.fingerprint = f"text:{document_bytes}:{len(self)}:{content_fingerprint([file])}"

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Record:
        # Opened for each document: a directory of text may have more files than a process may hold open.
        with open(self._file, "rb") as stream:
            stream.seek(int(self._bounds[index]))
            data = stream.read(int(self._bounds[index + 1] - self._bounds[index]))
        return {"text": self._text(data, int(self._bounds[index]))}

    def _text(self, data: bytes, start: int) -> str:
        def where(at: int) -> str:
            with open(self._file, "rb") as stream:
                line = stream.read(start + at).count(b"\n") + 1
            return f"{self._file}, line {line}, byte {start + at} of the file,"

        return _decode(data, where)


# ---------------------------------------------------------------------------------------------------- Parquet


@dataclasses.dataclass(frozen=True)
class Parquet:
    """A Parquet file. `field` is the column of texts; "messages" or "prompt" and "completion" are used when present.

    Random access decodes whole row groups; decoded ones are kept up to 2 GiB. For a larger file write an ArrayRecord
    data set first (`build_tfds`).
    """

    path: str
    field: str = "text"

    def open(self) -> Records:
        return _ParquetRecords(checked_file(self.path), self.field)


class _ParquetRecords:
    def __init__(self, file: Path, field: str):
        import pyarrow
        import pyarrow.parquet

        self._name, self._field = file, field
        try:
            self._file = pyarrow.parquet.ParquetFile(file, memory_map=True)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{file}: not a readable Parquet file ({error}).") from None
        names = self._file.schema_arrow.names
        self._columns = [name for name in (field, CONVERSATION, *PAIR) if name in names]
        if not (field in names or CONVERSATION in names or all(name in names for name in PAIR)):
            raise DataError(f"{file}: no column {field!r}. Its columns are {names}. Name the one that holds the text.")
        rows = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._ends = list(itertools.accumulate(rows))
        if not len(self):
            raise DataError(f"{file}: the file has no rows. Give a file with at least one record.")
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self.fingerprint = f"parquet:{field}:{len(self)}:{content_fingerprint([file])}"
        self[0]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _group(self, group: int) -> Any:
        if group not in self._cache:
            self._cache[group] = self._file.read_row_group(group, columns=self._columns)
            while sum(table.nbytes for table in self._cache.values()) > _ROW_GROUP_CACHE_BYTES and len(self._cache) > 1:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]

    def __getitem__(self, index: int) -> Record:
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        where = f"{self._name}, row {index}"
        try:
            # A string column may hold bytes that are not UTF-8; Arrow decodes them here.
            record = {name: self._group(group)[name][row].as_py() for name in self._columns}
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
        return check_record({key: value for key, value in record.items() if value is not None}, self._field, where)


# ---------------------------------------------------------------------------------------------------- ArrayRecord


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """ArrayRecord files whose records are JSON objects in UTF-8. Files of a TFDS data set are read by `Tfds`."""

    paths: tuple[str, ...]
    field: str = "text"

    def __post_init__(self):
        if not self.paths:
            raise ValueError("ArrayRecord.paths is empty; give at least one file.")

    def open(self) -> Records:
        return _ArrayRecordRecords([checked_file(path) for path in self.paths], self.field)


class _ArrayRecordRecords:
    def __init__(self, files: list[Path], field: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._names, self._field = ", ".join(str(file) for file in files), field
        try:
            self._records = ArrayRecordDataSource([str(file) for file in files])
            count = len(self._records)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{self._names}: not readable as ArrayRecord ({error}).") from None
        if not count:
            raise DataError(f"{self._names}: no records. Give files with at least one.")
        self.fingerprint = f"array_record:{field}:{count}:{content_fingerprint(files)}"
        self[0]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        where = f"{self._names}, record {index}"
        try:
            record = json.loads(self._records[index])
        except ValueError:
            raise DataError(
                f"{where}: not a JSON object. If the files belong to a TFDS data set, give its directory (the one "
                "with dataset_info.json) instead."
            ) from None
        return check_record(record, self._field, where)


# ---------------------------------------------------------------------------------------------------- several files


@dataclasses.dataclass(frozen=True)
class Concatenated:
    """Several sources read one after the other, as the files of a directory are."""

    parts: tuple[JsonLines | PlainText | Parquet | ArrayRecord, ...]

    def __post_init__(self):
        if not self.parts:
            raise ValueError("Concatenated.parts is empty; give at least one source.")
        fields = {part.field for part in self.parts}
        if len(fields) > 1:
            raise ValueError(f"the parts name different text fields, {sorted(fields)}; they must agree.")

    @property
    def field(self) -> str:
        return self.parts[0].field

    def open(self) -> Records:
        return _ConcatenatedRecords([part.open() for part in self.parts])


class _ConcatenatedRecords:
    def __init__(self, parts: list[Records]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))
        joined = "|".join(part.fingerprint for part in parts)
        self.fingerprint = f"concatenated:{len(self)}:{hashlib.sha256(joined.encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]
