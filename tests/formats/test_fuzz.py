"""Files damaged at random: reading them gives `FormatError` or arrays, and never more memory than the file is worth."""

import json
import random
import struct
import tracemalloc
import warnings

import pytest
from gguf_bytes import BOOL, I8, STRING, TYPES, U8, U32, U64, array, array_pair, gguf, pair, tensor

from jaxdistill.formats.gguf import open_gguf
from jaxdistill.formats.safetensors import open_safetensors
from jaxdistill.formats.source import FormatError

INTERESTING = (0, 1, 7, 8, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def gguf_sample() -> bytes:
    nested = struct.pack("<IQ", 9, 2) + array(U8, [1, 2]) + array(STRING, ["x", ""])
    pairs = [pair("general.alignment", U32, 32), pair("name", STRING, "model"), pair("count", U64, 5)]
    pairs += [array_pair("words", array(STRING, ["a", "bc", "def"])), array_pair("flags", array(BOOL, [True, False]))]
    pairs += [array_pair("small", array(I8, [-1, 1])), array_pair("nested", nested)]
    tensors = [tensor("f", (4, 3), TYPES["F32"], 0), tensor("q", (32, 2), TYPES["Q4_1"], 64)]
    return gguf(pairs, [*tensors, tensor("h", (8,), TYPES["F16"], 128)], bytes(range(160)))


def safetensors_sample() -> bytes:
    header = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, nbytes in (
        ("a", "F32", [2, 3], 24),
        ("b", "BF16", [5], 10),
        ("c", "U8", [], 1),
        ("d", "F64", [0], 0),
    ):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A few random faults: bytes, 32- and 64-bit numbers, digits of JSON, missing, doubled and cut pieces."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        fault = rng.randrange(7)
        if fault == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif fault == 1:
            out[at : at + 8] = struct.pack("<Q", rng.choice(INTERESTING))
        elif fault == 2:
            out[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING) & 0xFFFFFFFF)
        elif fault == 3:
            digits = [i for i, byte in enumerate(out) if 48 <= byte <= 57]
            where = rng.choice(digits) if digits else at
            out[where : where + 1] = str(rng.choice((*INTERESTING, -1, 1.5, "null", '"x"', "[[", 10**25))).encode()
        elif fault == 4:
            del out[at : at + rng.randint(1, 40)]
        elif fault == 5:
            out[at:at] = out[at : at + rng.randint(1, 40)]
        else:
            del out[at:]
    return bytes(out)


def read_everything(opener, path) -> int:
    """Reads all tensors; returns the bytes of the arrays made."""
    total = 0
    with opener(path) as source:
        for name in source.names():
            values = source.read(name)
            assert values.shape == source.info(name).shape
            assert values.dtype == source.info(name).dtype
            total += values.nbytes
            source.read_slice(name, tuple(slice(0, size // 2) for size in values.shape))
    return total


def fuzz(opener, sample: bytes, path, *, rounds: int, seed: int) -> tuple[int, int, int]:
    """Returns (files refused, files read, peak of traced memory in bytes)."""
    rng = random.Random(seed)
    refused = read = 0
    read_everything(opener, write(path, sample))  # imports and caches do not count
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # damaged scales may be NaN or infinite
            for _ in range(rounds):
                write(path, damaged(rng, sample))
                try:
                    # Quantised blocks grow at most eightfold when they become float32; files are below 2 kB.
                    assert read_everything(opener, path) <= 8 * 2000
                    read += 1
                except FormatError:
                    refused += 1
        return refused, read, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write(path, data: bytes):
    path.write_bytes(data)
    return path


CASES = {"gguf": (open_gguf, gguf_sample), "safetensors": (open_safetensors, safetensors_sample)}


def check(case: str, tmp_path, *, rounds: int, seed: int) -> None:
    opener, sample = CASES[case]
    assert len(sample()) < 1000
    refused, read, peak = fuzz(opener, sample(), tmp_path / f"model.{case}", rounds=rounds, seed=seed)
    assert refused > rounds / 2
    assert read > 0  # faults in the data itself are legal files
    # Python objects, caches and the interpreter's own noise; the headers announce up to 2**64 bytes.
    assert peak < 500_000


@pytest.mark.parametrize("case", CASES)
def test_damaged_files(tmp_path, case):
    check(case, tmp_path, rounds=500, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_damaged_files_at_length(tmp_path, case, seed):
    check(case, tmp_path, rounds=20_000, seed=seed)


@pytest.mark.parametrize("kind", [STRING, U8, U64])
def test_large_headers_cost_in_proportion_to_the_file(tmp_path, kind):
    """An honest array of a million bytes, then one that claims 2**40 elements: peak memory follows the file."""
    body = array(kind, [""] * 125_000 if kind == STRING else [3] * (10**6 if kind == U8 else 125_000), count=None)
    lying = body[:4] + struct.pack("<Q", 2**40) + body[12:]
    for value, allowed in ((body, True), (lying, False)):
        path = write(tmp_path / "model.gguf", gguf([array_pair("k", value)]))
        tracemalloc.start()
        try:
            if allowed:
                open_gguf(path)
            else:
                with pytest.raises(FormatError, match="1099511627776"):
                    open_gguf(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # A list entry takes 8 bytes even where the file has a one-byte number.
        assert peak < (10 * path.stat().st_size if allowed else 100_000)


def test_a_lying_safetensors_size_allocates_nothing(tmp_path):
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    text = json.dumps({"w": entry}).encode()
    path = write(tmp_path / "model.safetensors", struct.pack("<Q", len(text)) + text + bytes(64))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"end at byte 1099511627\d+; the file has"):
            open_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
