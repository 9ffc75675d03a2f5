"""Builds GGUF files byte by byte, as the specification says, so that tests can also build wrong ones."""

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12}
TYPES |= {"Q5_K": 13, "Q6_K": 14, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "BF16": 30}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + SCALARS[kind], value)


def pair(key: str, kind: int, value) -> bytes:
    return string(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(kind: int, values, count: int | None = None) -> bytes:
    """An array's value: element type, length (`count` may lie), elements."""
    length = len(values) if count is None else count
    return struct.pack("<IQ", kind, length) + b"".join(scalar(kind, value) for value in values)


def array_pair(key: str, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", ARRAY) + value


def tensor(name: str, ne: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def gguf(pairs=(), tensors=(), data=b"", *, version=3, counts=None, magic=b"GGUF", alignment=32) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    header = magic + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join((*pairs, *tensors))
    return header + b"\0" * (-len(header) % alignment) + data
