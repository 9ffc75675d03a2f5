"""safetensors files and directories as named arrays, read as views of the mapped file and written as a stream.

Own code, not the `safetensors` package: with NumPy its reader knows neither bfloat16 nor float8 and copies every
tensor, its writer wants all tensors in memory at once, and neither writes atomically. The package is the reference
in the tests.

Source: the format description of the safetensors project; the names of shards and index are those of Hugging Face.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxdistill.formats.paths import AnyPath, Finished, any_path, atomic_file, write_text
from jaxdistill.formats.source import (
    FETCH_AGAIN,
    ByteFile,
    FormatError,
    TensorInfo,
    TensorSource,
    checked_index,
    fits_numpy,
    lookup,
    open_bytes,
)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's reference reader."""

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# Reading


def open_safetensors(path: AnyPath) -> TensorSource:
    """Opens a model's safetensors: a file, an index (`*.index.json`), or a directory that holds either.

    A directory has `model.safetensors`, or `model.safetensors.index.json` and the shards that it names. All headers
    are read and checked; no tensor is. Raises `FormatError`.
    """
    where = any_path(path)
    if not where.is_dir():
        return ShardedSafetensors(where) if where.name.endswith(".index.json") else SafetensorsFile(where)
    single, index = where / SINGLE_NAME, where / INDEX_NAME
    if single.exists() and index.exists():
        raise FormatError(f"{where} has both {SINGLE_NAME} and {INDEX_NAME}. Give the path of the one to read.")
    if index.exists():
        return ShardedSafetensors(index)
    if single.exists():
        return SafetensorsFile(single)
    found = sorted(entry.name for entry in where.glob("*.safetensors"))
    raise FormatError(
        f"{where} has neither {SINGLE_NAME} nor {INDEX_NAME}; other safetensors files there: {found or 'none'}. "
        "Give a directory with one of the two, or the path of a file."
    )


class SafetensorsFile:
    """One safetensors file as a `TensorSource`; arrays are read-only views of the mapped file.

    metadata: the strings under `__metadata__`.
    """

    def __init__(self, path: AnyPath):
        self.path = any_path(path)
        self._file = open_bytes(self.path)
        self.metadata, self._tensors = _parse_header(self._file)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        return lookup(self.path, self._tensors, name).info

    def read(self, name: str) -> np.ndarray:
        stored = lookup(self.path, self._tensors, name)
        return self._file.array(stored.info.dtype, stored.info.shape, stored.offset)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        info = self.info(name)
        index = checked_index(self.path, name, info.shape, index)
        if not index:
            return self.read(name)
        # Whole entries of the first axis are read, and the others cut afterwards.
        first, *others = index
        row = info.nbytes // max(info.shape[0], 1)
        offset = lookup(self.path, self._tensors, name).offset + first.start * row
        rows = self._file.array(info.dtype, (first.stop - first.start, *info.shape[1:]), offset)
        return rows[:: first.step, *others]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ShardedSafetensors:
    """The shards that an index names, as one `TensorSource`. Index and shards must agree on every tensor."""

    def __init__(self, index: AnyPath):
        self.path = any_path(index)
        weight_map = _parse_index(self.path)
        self._shards: dict[str, SafetensorsFile] = {}
        for shard in dict.fromkeys(weight_map.values()):
            if not (self.path.parent / shard).is_file():
                raise FormatError(
                    f"{self.path.parent / shard} is missing; {self.path.name} names it as a shard. Download or copy it."
                )
            self._shards[shard] = SafetensorsFile(self.path.parent / shard)
        for name, shard in weight_map.items():
            if name not in self._shards[shard]._tensors:
                raise FormatError(
                    f"{self.path.parent / shard} has no tensor {name!r}, but {self.path.name} says so. "
                    "Index and shards are of different versions: download or copy them together."
                )
        for shard, source in self._shards.items():
            for name in source.names():
                if weight_map.get(name) != shard:
                    raise FormatError(
                        f"{source.path} has the tensor {name!r}, which {self.path.name} places in "
                        f"{weight_map.get(name, 'no shard')}. "
                        "Index and shards are of different versions: download or copy them together."
                    )
        self._sources = {name: self._shards[shard] for name, shard in weight_map.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def info(self, name: str) -> TensorInfo:
        return lookup(self.path, self._sources, name).info(name)

    def read(self, name: str) -> np.ndarray:
        return lookup(self.path, self._sources, name).read(name)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return lookup(self.path, self._sources, name).read_slice(name, index)

    def close(self) -> None:
        for source in self._shards.values():
            source.close()

    def __enter__(self) -> ShardedSafetensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _Stored:
    info: TensorInfo
    offset: int
    """First byte in the file."""


def _parse_header(file: ByteFile) -> tuple[dict[str, str], dict[str, _Stored]]:
    """Checks the whole header against the file's size; returns (metadata, tensors in the order of their data)."""
    path, size = file.path, file.size
    if size < 8:
        raise FormatError(f"{path}: has {size} bytes; a safetensors file has at least 8. {FETCH_AGAIN}")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: announces a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed. "
            "Check that it is a safetensors file."
        )
    if 8 + length > size:
        raise FormatError(f"{path}: announces a header of {length} bytes; the file has {size}. {FETCH_AGAIN}")
    header = _parse_json(path, file.read(8, 8 + length), "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must be an object of strings. Write the file again.")
    entries = {name: _parse_entry(path, name, entry) for name, entry in header.items()}
    data_start, end, before = 8 + length, 0, ""
    # Empty tensors first where several begin at one byte.
    for name, (info, begin) in sorted(entries.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if data_start + begin + info.nbytes > size:
            raise FormatError(
                f"{path}: the data_offsets of {name!r} end at byte {data_start + begin + info.nbytes}; "
                f"the file has {size}. {FETCH_AGAIN}"
            )
        if begin != end:
            problem = f"overlap {before!r}" if begin < end else "leave a gap before them"
            raise FormatError(
                f"{path}: the data_offsets of {name!r} begin at {begin} and {problem}; {end} is allowed. "
                "Write the file again."
            )
        end, before = begin + info.nbytes, name
    if data_start + end != size:
        raise FormatError(
            f"{path}: has {size} bytes; the tensors end at byte {data_start + end}. The rest belongs to no tensor: "
            "download or write the file again."
        )
    tensors = {name: _Stored(info, data_start + begin) for name, (info, begin) in entries.items()}
    return metadata, dict(sorted(tensors.items(), key=lambda item: item[1].offset))


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int]:
    """One tensor of the header as (shape and dtype, first byte in the data)."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"{path}: the entry of {name!r} must be an object with dtype, shape and data_offsets, no more and no less. "
            "Write the file again."
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(
            f"{path}: {name!r} has the unknown dtype {entry['dtype']!r}; allowed are {', '.join(DTYPES)}. "
            "Convert the file to one of them."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_counts(shape) or not fits_numpy(tuple(shape), dtype.itemsize):
        raise FormatError(f"{path}: {name!r} has the shape {shape!r:.200}; a list of counts is allowed. {FETCH_AGAIN}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise FormatError(
            f"{path}: {name!r} has the data_offsets {offsets!r:.200}; two byte positions are allowed. {FETCH_AGAIN}"
        )
    info = TensorInfo(tuple(shape), dtype)
    begin, end = offsets
    if end - begin != info.nbytes:
        raise FormatError(
            f"{path}: {name!r} has dtype {entry['dtype']} and shape {shape}, which take {info.nbytes} bytes; "
            f"its data_offsets {offsets} span {end - begin}. {FETCH_AGAIN}"
        )
    return info, begin


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)


def _parse_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name to shard file name."""
    with contextlib.closing(open_bytes(path)) as file:
        index = _parse_json(path, file.read(0, MAX_HEADER_BYTES), "the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{path}: must have a weight_map from tensor names to shard names. {FETCH_AGAIN}")
    for shard in set(weight_map.values()):
        # An index may come from anywhere; it names siblings, never a path out of its directory.
        if not shard.endswith(".safetensors") or Path(shard).name != shard or len(shard) > 200:
            raise FormatError(f"{path}: names the shard {shard!r}; allowed are *.safetensors files beside the index.")
    return weight_map


def _parse_json(path: Path, text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
            raise FormatError(f"{path}: {what} has {twice!r} twice; names are unique. Write the file again.")
        return result

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: {what} is not JSON in UTF-8 ({error}). {FETCH_AGAIN}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {what} is a JSON {type(value).__name__}; an object is allowed. {FETCH_AGAIN}")
    return value


# Writing


def write_safetensors(
    path: AnyPath,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file atomically, one tensor in memory at a time.

    infos: every tensor's shape and dtype, in the order in which `tensors` gives them. metadata: None is
    `{"format": "pt"}`, which Hugging Face readers ask for. Raises `ValueError` where `tensors` differs from `infos`.
    """
    with atomic_file(path) as file:
        _fill(_begin_file(file, infos, metadata), infos, tensors)


def save_safetensors(
    directory: AnyPath,
    infos: Mapping[str, TensorInfo],
    tensors: Callable[[Collection[str]], Iterable[tuple[str, np.ndarray]]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    done: Finished | None = None,
) -> tuple[Path, ...]:
    """Writes a model's weights into a directory under Hugging Face's names; returns the paths written.

    One `model.safetensors` if the tensors fit into `max_shard_bytes`, else `model-00001-of-0000N.safetensors` and an
    index. A tensor is never split, so one that is larger has a shard of its own. Shards are written one after the
    other, each atomically, and the index last: use `paths.atomic_directory` or `resumable_directory` around it, so that
    all appear at once. tensors: gives those with the names that it is asked for, in their order. done: shards that are
    there already, by their names; others are added to it. See `write_safetensors` for the other arguments and errors.
    """
    folder, finished = any_path(directory), set() if done is None else done
    shards = _split(infos, max_shard_bytes)
    names = [SINGLE_NAME] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    written = names if len(shards) == 1 else [*names, INDEX_NAME]
    _refuse_other_layout(folder, set(written))
    for name, shard in zip(names, shards, strict=True):
        if name not in finished:
            write_safetensors(folder / name, shard, tensors(shard), metadata=metadata)
            finished.add(name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(info.nbytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return tuple(folder / name for name in written)


@dataclasses.dataclass(frozen=True)
class _Target:
    """A file whose header is written, and where each tensor's bytes go."""

    file: BinaryIO
    offsets: dict[str, int]


def _begin_file(file: BinaryIO, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> _Target:
    # Wide dtypes first, so that every tensor is aligned to its item size whatever the shapes are.
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
    begin, offsets = 0, {}
    for name in order:
        info = infos[name]
        if info.dtype not in _DTYPE_NAMES or name == "__metadata__":
            raise ValueError(
                f"the tensor {name!r} has dtype {info.dtype}; safetensors holds {', '.join(map(str, _DTYPE_NAMES))}, "
                "under any name but __metadata__."
            )
        offsets[name] = begin
        end = begin + info.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header of {len(infos)} tensors has {len(text)} bytes; at most {MAX_HEADER_BYTES} are allowed. "
            "Use smaller shards."
        )
    file.write(struct.pack("<Q", len(text)) + text)
    return _Target(file, {name: 8 + len(text) + offset for name, offset in offsets.items()})


def _fill(target: _Target, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes every tensor to its place; names, order, shapes and dtypes must be the announced ones."""
    given = iter(tensors)
    for name, info in infos.items():
        _write_next(target, name, info, given)
    for name, _ in given:
        raise ValueError(f"the tensor {name!r} was given, but all announced ones are written. Announce it in infos.")


def _write_next(target: _Target, name: str, info: TensorInfo, given: Iterator[tuple[str, np.ndarray]]) -> None:
    # A function of its own, so that a tensor is let go of before the next one is made.
    got, values = next(given, ("no more tensor", np.empty(0)))
    if got != name:
        raise ValueError(f"the next tensor to write is {name!r}, given was {got!r}. Give them in order.")
    values = np.asarray(values)
    if values.shape != info.shape or values.dtype != info.dtype:
        raise ValueError(
            f"the tensor {name!r} was announced as {info.dtype}{list(info.shape)}, "
            f"given was {values.dtype}{list(values.shape)}."
        )
    target.file.seek(target.offsets[name])
    target.file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _split(infos: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[dict[str, TensorInfo]]:
    """Consecutive tensors, as many per shard as fit; always at least one shard."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1.")
    shards: list[dict[str, TensorInfo]] = [{}]
    used = 0
    for name, info in infos.items():
        if shards[-1] and used + info.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = info
        used += info.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _refuse_other_layout(folder: Path, written: set[str]) -> None:
    """Leftover weights of another sharding would make the directory ambiguous."""
    present = {entry.name for pattern in ("model*.safetensors", INDEX_NAME) for entry in folder.glob(pattern)}
    if present - written:
        raise FileExistsError(
            f"{folder} already has {sorted(present - written)}, which this model would not replace. "
            "Write to another directory, or move them away first."
        )
