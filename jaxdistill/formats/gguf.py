"""GGUF files (versions 2 and 3) as named arrays: metadata as a plain dict, tensors dequantised when they are read.

The header is parsed here and not by `gguf.GGUFReader`, for two reasons. That reader makes a NumPy object for every
string of the vocabulary (2.4 s for SmolLM2-135M's 98,052 strings, against 0.05 s here), and it trusts the counts in
the file. Block data is dequantised by `gguf.quants`, the reference implementation in NumPy.

Source: the GGUF specification of the ggml project.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxdistill.formats.paths import AnyPath, any_path, fetched
from jaxdistill.formats.source import (
    FETCH_AGAIN,
    FormatError,
    MappedFile,
    TensorInfo,
    checked_index,
    fits_numpy,
    lookup,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NESTED_ARRAYS = 4
DEFAULT_ALIGNMENT = 32

PLAIN_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""Encodings that are stored as they are and read as views of the file."""

QUANTISED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"),
)
"""Encodings in blocks along the last axis, read as float32: those that `gguf.quants` dequantises."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file: encoding, shape in elements, first byte."""

    encoding: str
    shape: tuple[int, ...]
    offset: int

    @property
    def block(self) -> tuple[int, int]:
        """(elements, bytes) of one block along the last axis."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.encoding]]

    @property
    def nbytes(self) -> int:
        elements, stored_bytes = self.block
        return math.prod(self.shape) // elements * stored_bytes


def open_gguf(path: AnyPath) -> GgufSource:
    """Opens a GGUF file for reading; see `GgufSource`. Raises `FormatError`."""
    return GgufSource(path)


class GgufSource:
    """A GGUF file as a `TensorSource`.

    Names are llama.cpp's (`blk.0.attn_q.weight`), shapes are in NumPy order (the reverse of ggml's `ne`). Quantised
    tensors are read as float32, others as views in their own dtype.

    metadata: the key-value pairs of the header as Python numbers, strings, booleans and lists.
    """

    def __init__(self, path: AnyPath):
        self.path = any_path(path)
        self._file = MappedFile(fetched(self.path))
        header = _Header(self._file)
        self.metadata: dict[str, Any] = header.metadata
        self._tensors = header.tensors

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        stored = lookup(self.path, self._tensors, name)
        return TensorInfo(stored.shape, PLAIN_DTYPES.get(stored.encoding, np.dtype(np.float32)))

    def encoding(self, name: str) -> str:
        """How the tensor is stored, in ggml's terms: "F32", "Q4_1", …"""
        return lookup(self.path, self._tensors, name).encoding

    def stored_bytes(self, name: str) -> int:
        """Bytes that the tensor takes in the file."""
        return lookup(self.path, self._tensors, name).nbytes

    def read(self, name: str) -> np.ndarray:
        stored = lookup(self.path, self._tensors, name)
        if stored.encoding in PLAIN_DTYPES:
            return self._file.array(PLAIN_DTYPES[stored.encoding], stored.shape, stored.offset)
        return _dequantise(self._blocks(stored), stored).reshape(stored.shape)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        stored = lookup(self.path, self._tensors, name)
        full = checked_index(self.path, name, stored.shape, index)
        if stored.encoding in PLAIN_DTYPES:
            return self.read(name)[full]
        elements, _ = stored.block
        *rows, last = full
        first = last.start // elements
        blocks = self._blocks(stored)[*rows, first : -(-last.stop // elements)]
        values = _dequantise(blocks, stored).reshape(*blocks.shape[:-2], blocks.shape[-2] * elements)
        return values[..., last.start - first * elements : last.stop - first * elements : last.step]

    def _blocks(self, stored: _Stored) -> np.ndarray:
        """The raw bytes as [*leading axes, blocks, bytes per block]; a view."""
        elements, stored_bytes = stored.block
        shape = (*stored.shape[:-1], stored.shape[-1] // elements, stored_bytes)
        return self._file.array(np.dtype(np.uint8), shape, stored.offset)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _dequantise(blocks: np.ndarray, stored: _Stored) -> np.ndarray:
    """[..., blocks, bytes per block] to float32 [all elements], one row of blocks after the other."""
    elements, stored_bytes = stored.block
    if blocks.size == 0:
        return np.empty(0, np.float32)
    # `dequantize` works in groups of 16 rows. Rows of about 4,096 elements keep a group's temporaries in the cache.
    flat = blocks.reshape(-1)
    per_row = math.gcd(flat.size // stored_bytes, 4096 // elements)
    rows = flat.reshape(-1, per_row * stored_bytes)
    return dequantize(rows, GGMLQuantizationType[stored.encoding]).reshape(-1)


class _Header:
    """Parses the header. Every length is compared with the bytes that are left before anything is made of it."""

    def __init__(self, file: MappedFile):
        self._path: Path = file.path
        self._data = file.buffer
        self._size = file.size
        self._at = 0
        tensor_count, pair_count = self._preamble()
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            self._pair()
        alignment = self._alignment()
        self.tensors: dict[str, _Stored] = {}
        for _ in range(tensor_count):
            self._tensor(alignment)
        self._place_tensors(-(-self._at // alignment) * alignment)

    def _error(self, found: str, remedy: str = FETCH_AGAIN) -> FormatError:
        return FormatError(f"{self._path}: {found} {remedy}")

    def _preamble(self) -> tuple[int, int]:
        """Checks magic, version and counts; returns (tensors, metadata pairs)."""
        magic = self._data[:4]
        if magic != MAGIC:
            raise self._error(
                f"starts with {magic!r}; a GGUF file starts with {MAGIC!r}.", "Give the path of a GGUF file."
            )
        self._at = 4
        version = self._number("<I", "the version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0 and version >> 24 in VERSIONS:
                raise self._error(
                    "is a big-endian GGUF file; only little-endian ones are read.", "Convert it with llama.cpp."
                )
            raise self._error(
                f"is GGUF version {version}; versions {VERSIONS} are read.", "Convert it with a current llama.cpp."
            )
        tensor_count = self._number("<Q", "the number of tensors")
        pair_count = self._number("<Q", "the number of metadata pairs")
        # The least that a pair takes: length of an empty key, type, a one-byte value. A tensor: the same without value,
        # number of dimensions, offset.
        self._require(pair_count * 13 + tensor_count * 24, f"{pair_count} metadata pairs and {tensor_count} tensors")
        return tensor_count, pair_count

    def _require(self, length: int, what: str) -> None:
        left = self._size - self._at
        if length > left:
            raise self._error(
                f"the header announces {what} at byte {self._at}, which take at least {length} bytes; "
                f"the file has {left} more."
            )

    def _number(self, form: str, what: str) -> Any:
        length = struct.calcsize(form)
        self._require(length, what)
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += length
        return value

    def _string(self, what: str) -> str:
        length = self._number("<Q", f"the length of {what}")
        self._require(length, f"{what} of {length} bytes")
        start, self._at = self._at, self._at + length
        try:
            return self._data[start : self._at].decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{what} at byte {start} is not UTF-8 ({error.reason}).") from None

    def _pair(self) -> None:
        key = self._string("a metadata key")
        if key in self.metadata:
            raise self._error(f"the metadata key {key!r} occurs twice; keys are unique.", "Write the file again.")
        kind = self._number("<I", f"the type of {key!r}")
        self.metadata[key] = self._value(kind, key, depth=0)

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(f"the string {key!r}")
        if kind == _ARRAY:
            return self._array(key, depth)
        if kind not in _SCALARS:
            raise self._error(f"the metadata {key!r} has type {kind}; types 0 to 12 exist.")
        return self._number(_SCALARS[kind], f"the value of {key!r}")

    def _array(self, key: str, depth: int) -> list[Any]:
        if depth >= MAX_NESTED_ARRAYS:
            raise self._error(f"the array {key!r} is nested more than {MAX_NESTED_ARRAYS} deep.")
        kind = self._number("<I", f"the element type of {key!r}")
        count = self._number("<Q", f"the length of {key!r}")
        if kind == _STRING:
            return self._strings(key, count)
        if kind == _ARRAY:
            self._require(count * 12, f"the array {key!r} of {count} arrays")
            return [self._array(key, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._error(f"the array {key!r} has elements of type {kind}; types 0 to 12 exist.")
        dtype = np.dtype(np.uint8 if kind == _BOOL else _SCALARS[kind])
        self._require(count * dtype.itemsize, f"the array {key!r} of {count} numbers")
        values = np.frombuffer(self._data, dtype, count, self._at) if count else np.empty(0, dtype)
        self._at += values.nbytes
        return (values != 0).tolist() if kind == _BOOL else values.tolist()

    def _strings(self, key: str, count: int) -> list[str]:
        """Vocabularies and merges: the one loop of the header that runs a hundred thousand times."""
        self._require(count * 8, f"the array {key!r} of {count} strings")
        data, size, at, read_length = self._data, self._size, self._at, struct.Struct("<Q").unpack_from
        values = []
        try:
            for _ in range(count):
                (length,) = read_length(data, at)
                start, at = at + 8, at + 8 + length
                if at > size:
                    break
                values.append(data[start:at].decode())
        except struct.error:  # fewer than 8 bytes are left
            pass
        except UnicodeDecodeError as error:
            raise self._error(f"string {len(values)} of {key!r} is not UTF-8 ({error.reason}).") from None
        if len(values) < count:
            raise self._error(f"the file ends inside string {len(values)} of {key!r}, which announces {count} strings.")
        self._at = at
        return values

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(
                f"general.alignment is {alignment!r}; allowed are powers of two.", "Write the file again."
            )
        return alignment

    def _tensor(self, alignment: int) -> None:
        """Reads one entry of the tensor table. Offsets stay relative to the data until `_place_tensors`."""
        name = self._string("a tensor name")
        if name in self.tensors:
            raise self._error(f"the tensor {name!r} occurs twice; names are unique.", "Write the file again.")
        dimensions = self._number("<I", f"the number of dimensions of {name!r}")
        if dimensions > MAX_DIMENSIONS:
            raise self._error(f"the tensor {name!r} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are allowed.")
        extents = [self._number("<Q", f"the shape of {name!r}") for _ in range(dimensions)]
        encoding = self._encoding(name, self._number("<I", f"the type of {name!r}"))
        offset = self._number("<Q", f"the offset of {name!r}")
        stored = _Stored(encoding, tuple(reversed(extents)), offset)
        elements, _ = stored.block
        if elements > 1 and (not stored.shape or stored.shape[-1] % elements):
            raise self._error(
                f"the tensor {name!r} has shape {stored.shape} and type {encoding}; "
                f"the last axis must be a multiple of the block of {elements}."
            )
        if not fits_numpy(stored.shape, 8):
            raise self._error(f"the tensor {name!r} has the impossible shape {stored.shape}.")
        if offset % alignment:
            raise self._error(f"the tensor {name!r} is at offset {offset}; offsets are multiples of {alignment}.")
        self.tensors[name] = stored

    def _encoding(self, name: str, number: int) -> str:
        allowed = (*PLAIN_DTYPES, *QUANTISED)
        remedy = "Convert it with llama.cpp's llama-quantize, to Q8_0 or F16 for instance."
        if number not in GGML_QUANT_SIZES:
            raise self._error(f"the tensor {name!r} has the unknown type {number}; allowed are {allowed}.", remedy)
        encoding = GGMLQuantizationType(number).name
        if encoding not in allowed:
            raise self._error(f"the tensor {name!r} is stored as {encoding}; allowed are {allowed}.", remedy)
        return encoding

    def _place_tensors(self, data_start: int) -> None:
        """Makes offsets absolute, and checks that tensors lie inside the file and apart from each other."""
        end, before = data_start, ""
        for name, stored in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            offset = data_start + stored.offset
            if offset + stored.nbytes > self._size:
                raise self._error(
                    f"the tensor {name!r} ({stored.encoding}, shape {stored.shape}) takes bytes {offset} to "
                    f"{offset + stored.nbytes}; the file has {self._size}."
                )
            if offset < end and stored.nbytes:
                raise self._error(
                    f"the tensor {name!r} starts at byte {offset}, inside {before!r}, which ends at {end}."
                )
            if stored.nbytes:
                end, before = offset + stored.nbytes, name
            self.tensors[name] = dataclasses.replace(stored, offset=offset)
