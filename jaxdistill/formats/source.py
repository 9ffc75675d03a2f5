"""What every weight file looks like to the rest of the house: named arrays, read one at a time."""

from __future__ import annotations

import dataclasses
import difflib
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from jaxdistill.formats.paths import is_remote, store_of

Tensor = TypeVar("Tensor")

FETCH_AGAIN = "The file is incomplete or damaged: download or copy it again."
COPY_IT = "Try again, or copy the file to a disk and give that path."


class FormatError(ValueError):
    """A file does not hold what its format promises. The message says which file, what was found, what to do."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor as `TensorSource.read` returns it. Row-major: the last axis is contiguous."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class TensorSource(Protocol):
    """Named arrays in a file or a directory, whatever the format: read one tensor, or a part of one, at a time.

    Opening checks the whole header against the file sizes and reads no tensor. Errors are `FormatError`s.
    """

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the file."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of what `read` would return; reads nothing."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor; read-only where it is a view of the mapped file."""
        ...

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]` without reading the rest; one slice per axis, steps positive, bounds inside."""
        ...

    def close(self) -> None:
        """Lets go of the files. Arrays that were returned stay valid."""
        ...

    def __enter__(self) -> TensorSource: ...

    def __exit__(self, *exception: object) -> None: ...


class ByteFile(Protocol):
    """A file of which parts are read."""

    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes:
        """These bytes, as many as there are of them."""
        ...

    def array(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """A read-only array of part of the file; the caller has checked that it lies inside."""
        ...

    def close(self) -> None: ...


def open_bytes(path: Path) -> ByteFile:
    """A mapped file, or one in an object store, of which no more is fetched than is asked for."""
    return RemoteFile(path) if is_remote(path) else MappedFile(path)


class RemoteFile:
    """A file in an object store: each part is a request of its own."""

    def __init__(self, path: Path):
        self.path = path
        self._store, self._name = store_of(path)
        if not path.is_file():
            raise FormatError(f"{path}: there is no such file. Give the path of an existing one.")
        size = self._store.info(self._name).get("size")
        if size is None:
            raise FormatError(f"{path}: the server does not say how large the file is. {COPY_IT}")
        self.size: int = size

    def read(self, start: int, stop: int) -> bytes:
        stop = min(stop, self.size)
        found = self._store.cat_file(self._name, start=start, end=stop)
        if len(found) != stop - start:
            raise FormatError(
                f"{self.path}: bytes {start} to {stop} were asked for, and {len(found)} bytes came instead of "
                f"{stop - start}. Either the file has changed meanwhile, or the server does not give parts of files. "
                f"{COPY_IT}"
            )
        return found

    def array(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self.read(offset, offset + count * dtype.itemsize), dtype).reshape(shape)

    def close(self) -> None:
        pass


class MappedFile:
    """A file's bytes, mapped read-only: nothing is read until touched, and views outlive `close`."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                # An empty file cannot be mapped; an empty buffer lets the header checks give their own message.
                self._buffer: mmap.mmap | bytes | None = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
                )
        except FileNotFoundError:
            raise FormatError(f"{path}: there is no such file. Give the path of an existing one.") from None
        except IsADirectoryError:
            raise FormatError(f"{path} is a directory; a file is needed. Name the file inside it.") from None

    @property
    def buffer(self) -> mmap.mmap | bytes:
        if self._buffer is None:
            raise FormatError(f"{self.path} was closed. Read its tensors before closing it.")
        return self._buffer

    def read(self, start: int, stop: int) -> bytes:
        return self.buffer[start:stop]

    def array(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """A read-only view of part of the file; the caller has checked that it lies inside."""
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self.buffer, dtype, math.prod(shape), offset).reshape(shape)

    def close(self) -> None:
        # The mapping is not closed but dropped: it ends with the last array that looks into it.
        self._buffer = None


def fits_numpy(shape: tuple[int, ...], itemsize: int) -> bool:
    """Whether NumPy can hold the shape at all: even an empty array may not have axes of astronomical length."""
    return len(shape) <= 64 and math.prod(max(extent, 1) for extent in shape) * itemsize < 2**63


def lookup(path: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The entry called `name`; an unknown name gives an error that lists the closest ones."""
    if name not in tensors:
        close = difflib.get_close_matches(name, tensors, n=3) or list(tensors)[:3]
        raise FormatError(f"{path} has no tensor {name!r} among its {len(tensors)}; the closest names are {close}.")
    return tensors[name]


def checked_index(path: Path, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, ...]:
    """`index` with every bound filled in. Refuses what NumPy would silently clip to fewer elements."""
    if len(index) != len(shape):
        raise IndexError(f"{path}: {name!r} has shape {shape}; the index has {len(index)} slices, give {len(shape)}.")
    full = []
    for axis, (part, size) in enumerate(zip(index, shape, strict=True)):
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        step = 1 if part.step is None else part.step
        if not (0 <= start <= stop <= size and step >= 1):
            raise IndexError(
                f"{path}: {name!r} has {size} entries along axis {axis}; the slice is {start}:{stop}:{step}. "
                "Allowed are 0 <= start <= stop <= size with a positive step."
            )
        full.append(slice(start, stop, step))
    return tuple(full)
