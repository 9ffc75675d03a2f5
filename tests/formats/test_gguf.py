import struct

import gguf as reference
import ml_dtypes
import numpy as np
import pytest
from gguf_bytes import BOOL, F32, I8, I32, STRING, TYPES, U8, U32, U64, array, array_pair, gguf, pair, string, tensor

from jaxdistill.formats.gguf import QUANTISED, open_gguf
from jaxdistill.formats.source import FormatError, TensorInfo


@pytest.fixture
def write(tmp_path):
    def write(data: bytes):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


def half(data: bytes) -> np.float32:
    return np.float32(np.frombuffer(data, "<f2")[0])


# The scalar definitions of ggml's block formats, one block at a time, written out here.


def nibbles(data: bytes) -> list[int]:
    """Low nibbles are the first half of the block, high ones the second."""
    return [byte & 15 for byte in data] + [byte >> 4 for byte in data]


def q4_0(b):
    return [half(b[:2]) * np.float32(q - 8) for q in nibbles(b[2:])]


def q4_1(b):
    return [half(b[:2]) * np.float32(q) + half(b[2:4]) for q in nibbles(b[4:])]


def fifth_bits(data: bytes) -> list[int]:
    bits = int.from_bytes(data, "little")
    return [(bits >> i & 1) << 4 for i in range(32)]


def q5_0(b):
    return [half(b[:2]) * np.float32((q | h) - 16) for q, h in zip(nibbles(b[6:]), fifth_bits(b[2:6]), strict=True)]


def q5_1(b):
    both = zip(nibbles(b[8:]), fifth_bits(b[4:8]), strict=True)
    return [half(b[:2]) * np.float32(q | h) + half(b[2:4]) for q, h in both]


def q8_0(b):
    return [half(b[:2]) * np.float32(q) for q in struct.unpack("<32b", b[2:])]


def q2_k(b):
    scales, quants, d, smallest = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
    out = []
    for i in range(256):
        # 128 values per 32 bytes, 2 bits each; every 16 values have their own scale and minimum.
        q = quants[32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
        s = scales[i // 16]
        out.append(d * np.float32(s & 15) * np.float32(q) - smallest * np.float32(s >> 4))
    return out


def q3_k(b):
    high, quants, packed, d = b[:32], b[32:96], b[96:108], half(b[108:110])
    out = []
    for i in range(256):
        q = quants[32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
        q -= 0 if high[i % 32] >> (i // 32) & 1 else 4
        s = i // 16
        low4 = packed[s % 8] >> 4 * (s // 8) & 15
        high2 = packed[8 + s % 4] >> 2 * (s // 4) & 3
        out.append(d * np.float32((low4 | high2 << 4) - 32) * np.float32(q))
    return out


def six_bit_scales(packed: bytes) -> list[tuple[int, int]]:
    """(scale, minimum) of the eight sub-blocks of Q4_K and Q5_K."""
    first = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    rest = [
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4) for j in range(4, 8)
    ]
    return first + rest


def q4_k(b):
    d, smallest, scales, quants = half(b[:2]), half(b[2:4]), six_bit_scales(b[4:16]), b[16:]
    out = []
    for i in range(256):
        q = quants[32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15
        s, m = scales[i // 32]
        out.append(d * np.float32(s) * np.float32(q) - smallest * np.float32(m))
    return out


def q5_k(b):
    d, smallest, scales, high, quants = half(b[:2]), half(b[2:4]), six_bit_scales(b[4:16]), b[16:48], b[48:]
    out = []
    for i in range(256):
        q = quants[32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15
        q |= (high[i % 32] >> (i // 32) & 1) << 4
        s, m = scales[i // 32]
        out.append(d * np.float32(s) * np.float32(q) - smallest * np.float32(m))
    return out


def q6_k(b):
    low, high, scales, d = b[:128], b[128:192], struct.unpack("<16b", b[192:208]), half(b[208:210])
    out = []
    for i in range(256):
        group, j = divmod(i, 128)
        q = low[64 * group + j % 64] >> 4 * (j // 64) & 15
        q |= (high[32 * group + j % 32] >> 2 * (j // 32) & 3) << 4
        out.append(d * np.float32(scales[i // 16]) * np.float32(q - 32))
    return out


DEFINITIONS = {
    "Q4_0": (q4_0, 32, 18),
    "Q4_1": (q4_1, 32, 20),
    "Q5_0": (q5_0, 32, 22),
    "Q5_1": (q5_1, 32, 24),
    "Q8_0": (q8_0, 32, 34),
    "Q2_K": (q2_k, 256, 84),
    "Q3_K": (q3_k, 256, 110),
    "Q4_K": (q4_k, 256, 144),
    "Q5_K": (q5_k, 256, 176),
    "Q6_K": (q6_k, 256, 210),
}
BY_REFERENCE = (
    *("TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("MXFP4", "NVFP4"),
)
"""Encodings with tables too long to write out here: compared with the reference implementation."""
SCALE_BYTES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
SCALE_BYTES["Q6_K"] = (208,)


def random_blocks(encoding: str, count: int) -> bytes:
    """Random bytes with finite half-precision scales (random ones may be NaN)."""
    rng = np.random.default_rng(len(encoding) + count)
    stored_bytes = DEFINITIONS[encoding][2]
    blocks = rng.integers(0, 256, (count, stored_bytes), np.uint8)
    for at in SCALE_BYTES.get(encoding, (0,)):
        blocks[:, at : at + 2] = rng.normal(size=(count, 1)).astype("<f2").view(np.uint8)
    return blocks.tobytes()


def test_definitions_cover_every_quantised_encoding():
    assert not set(DEFINITIONS) & set(BY_REFERENCE)
    assert {*DEFINITIONS, *BY_REFERENCE} == set(QUANTISED)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of random bytes that are scales
@pytest.mark.parametrize("encoding", BY_REFERENCE)
def test_dequantises_as_the_reference(write, encoding):
    kind = reference.GGMLQuantizationType[encoding]
    elements, stored_bytes = reference.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2 * stored_bytes), np.uint8)
    path = write(gguf(tensors=[tensor("w", (2 * elements, 3), kind.value, 0)], data=blocks.tobytes()))
    expected = reference.quants.dequantize(blocks, kind)
    assert np.isfinite(expected).mean() > 0.5
    assert len(np.unique(expected)) > 2
    with open_gguf(path) as source:
        assert source.info("w") == TensorInfo((3, 2 * elements), np.dtype("float32"))
        assert (source.encoding("w"), source.stored_bytes("w")) == (encoding, blocks.size)
        assert source.read("w").dtype == np.float32
        np.testing.assert_array_equal(source.read("w"), expected)
        part = source.read_slice("w", (slice(1, 3), slice(elements - 3, elements + 5)))
        np.testing.assert_array_equal(part, expected[1:, elements - 3 : elements + 5])


@pytest.mark.parametrize("encoding", DEFINITIONS)
def test_dequantises_as_ggml_defines(write, encoding):
    define, elements, stored_bytes = DEFINITIONS[encoding]
    data = random_blocks(encoding, 6)
    path = write(gguf(tensors=[tensor("w", (2 * elements, 3), TYPES[encoding], 0)], data=data))
    blocks = [data[i : i + stored_bytes] for i in range(0, len(data), stored_bytes)]
    expected = np.array([value for block in blocks for value in define(block)]).reshape(3, 2 * elements)
    with open_gguf(path) as source:
        assert source.info("w") == TensorInfo((3, 2 * elements), np.dtype("float32"))
        assert source.encoding("w") == encoding
        assert source.stored_bytes("w") == len(data)
        assert source.read("w").dtype == np.float32
        np.testing.assert_array_equal(source.read("w"), expected)


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(None)),
        (slice(1, 2), slice(0, 2), slice(40, 90)),
        (slice(0, 2), slice(1, 3), slice(5, 96, 7)),
        (slice(0, 2, 2), slice(None), slice(31, 33)),
        (slice(1, 1), slice(None), slice(None)),
        (slice(None), slice(None), slice(7, 7)),
    ],
)
def test_slices_of_quantised_tensors(write, index):
    with open_gguf(
        write(gguf(tensors=[tensor("w", (96, 3, 2), TYPES["Q4_1"], 0)], data=random_blocks("Q4_1", 18)))
    ) as source:
        whole = source.read("w")
        assert whole.shape == (2, 3, 96)
        np.testing.assert_array_equal(source.read_slice("w", index), whole[index], strict=True)


def test_slice_dequantises_only_what_it_needs(write):
    """The other blocks hold NaN scales, which would raise a warning (an error here) if they were multiplied."""
    good = random_blocks("Q8_0", 1)
    poisoned = struct.pack("<e", float("inf")) + bytes(32)  # inf * 0
    path = write(gguf(tensors=[tensor("w", (64, 2), TYPES["Q8_0"], 0)], data=poisoned + good + poisoned + poisoned))
    with open_gguf(path) as source:
        part = source.read_slice("w", (slice(0, 1), slice(32, 64)))
        np.testing.assert_array_equal(part[0], q8_0(good))
        with pytest.warns(RuntimeWarning):
            source.read("w")


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [("F32", "<f4"), ("F16", "<f2"), ("BF16", ml_dtypes.bfloat16), ("F64", "<f8"), ("I8", "<i1"), ("I32", "<i4")],
)
def test_plain_encodings_are_views_in_their_own_dtype(write, encoding, dtype):
    values = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    source = open_gguf(write(gguf(tensors=[tensor("w", (4, 3), TYPES[encoding], 0)], data=values.tobytes())))
    read = source.read("w")
    np.testing.assert_array_equal(read, values, strict=True)
    assert not read.flags.owndata
    assert not read.flags.writeable
    np.testing.assert_array_equal(source.read_slice("w", (slice(1, 3), slice(0, 2))), values[1:, :2], strict=True)
    source.close()
    np.testing.assert_array_equal(read, values)
    with pytest.raises(FormatError, match=r"model.gguf was closed. Read its tensors before closing it"):
        source.read("w")


def test_reads_what_the_reference_writer_wrote(tmp_path):
    path = tmp_path / "reference.gguf"
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(5, 64)).astype(np.float32)
    writer = reference.GGUFWriter(path, "llama")
    writer.add_block_count(7)
    writer.add_bool("flag", True)
    writer.add_float32("number", 0.5)
    writer.add_int64("negative", -(2**40))
    writer.add_array("words", ["a", "é", "", "<s>"])
    writer.add_array("counts", [1, -2, 3])
    writer.add_custom_alignment(64)
    writer.add_tensor("plain", plain)
    quantised = reference.quants.quantize(plain, reference.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantised", quantised, raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", plain[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as source:
        assert source.metadata == {
            "general.architecture": "llama",
            "llama.block_count": 7,
            "flag": True,
            "number": 0.5,
            "negative": -(2**40),
            "words": ["a", "é", "", "<s>"],
            "counts": [1, -2, 3],
            "general.alignment": 64,
        }
        assert source.names() == ("plain", "quantised", "vector")
        np.testing.assert_array_equal(source.read("plain"), plain, strict=True)
        np.testing.assert_array_equal(source.read("vector"), plain[0], strict=True)
        # The grid of Q8_0 is max|x| / 127 of each 32 values, stored in half precision.
        assert np.abs(source.read("quantised") - plain).max() <= np.abs(plain).max() / 127 * 0.51


def test_metadata_becomes_plain_python(write):
    nested = struct.pack("<IQ", 9, 2) + array(U8, [1, 255]) + array(STRING, ["x"])
    pairs = [pair("n", U64, 2**63), pair("s", STRING, "ü"), pair("b", BOOL, True)]
    pairs += [array_pair("bools", array(BOOL, [True, False])), array_pair("empty", array(I32, []))]
    pairs += [array_pair("nested", nested), array_pair("small", array(I8, [-1, 1])), pair("f", F32, 0.25)]
    source = open_gguf(write(gguf(pairs=pairs, version=2)))
    assert source.metadata == {
        "n": 2**63,
        "s": "ü",
        "b": True,
        "bools": [True, False],
        "empty": [],
        "nested": [[1, 255], ["x"]],
        "small": [-1, 1],
        "f": 0.25,
    }
    assert [type(value) for value in source.metadata["bools"]] == [bool, bool]
    assert source.names() == ()


def test_empty_and_scalar_tensors(write):
    tensors = [tensor("empty", (32, 0), TYPES["Q4_1"], 0), tensor("none", (0,), 0, 0), tensor("scalar", (), 0, 0)]
    source = open_gguf(write(gguf(tensors=tensors, data=struct.pack("<f", 2.5))))
    assert source.read("empty").shape == (0, 32)
    assert source.read_slice("empty", (slice(None), slice(3, 9))).shape == (0, 6)
    assert source.read("none").shape == (0,)
    assert source.read("scalar").item() == 2.5


W = tensor("w", (4,), 0, 0)
BAD_HEADERS = {
    "magic": (gguf(magic=b"GGML"), "starts with b'GGML'; a GGUF file starts with b'GGUF'. Give the path of a GGUF"),
    "empty file": (b"", "starts with b''; a GGUF file starts with"),
    "version": (gguf(version=1), "is GGUF version 1; versions (2, 3) are read. Convert it with a current llama.cpp"),
    "big-endian": (gguf(version=3 << 24), "is a big-endian GGUF file; only little-endian ones are read. Convert it"),
    "no counts": (b"GGUF\3\0\0\0\1", "announces the number of tensors at byte 8, which take at least 8 bytes; the"),
    "tensor count": (
        gguf(counts=(2**60, 0)),
        "announces 0 metadata pairs and 1152921504606846976 tensors at byte 24, which take at least 276701161105643",
    ),
    "pair count": (gguf(counts=(0, 2**63)), "announces 9223372036854775808 metadata pairs and 0 tensors"),
    "key length": (gguf([struct.pack("<QQ", 2**62, 0)]), "a metadata key of 4611686018427387904 bytes at byte 32"),
    "key not UTF-8": (gguf([pair("k", U8, 0).replace(b"k", b"\xff")]), "a metadata key at byte 32 is not UTF-8"),
    "key twice": (gguf([pair("k", U8, 1), pair("k", U8, 2)]), "the metadata key 'k' occurs twice; keys are unique."),
    "string length": (gguf([string("k") + struct.pack("<IQ", 8, 10**15)]), "the string 'k' of 1000000000000000 bytes"),
    "value type": (gguf([string("k") + struct.pack("<IQ", 77, 0)]), "'k' has type 77; types 0 to 12 exist."),
    "array type": (gguf([array_pair("k", struct.pack("<IQ", 13, 0))]), "the array 'k' has elements of type 13; types"),
    "array length": (
        gguf([array_pair("k", array(U64, [1, 2], count=2**61))]),
        "the array 'k' of 2305843009213693952 numbers at byte 49, which take at least 18446744073709551616 bytes",
    ),
    "string array length": (
        gguf([array_pair("k", array(STRING, ["a"], count=2**40))]),
        "the array 'k' of 1099511627776 strings at byte 49",
    ),
    "string in array": (
        gguf([array_pair("k", array(STRING, ["a"], count=2) + struct.pack("<Q", 2**50))]),
        "the file ends inside string 1 of 'k', which announces 2 strings",
    ),
    "string array cut": (
        gguf([array_pair("k", array(STRING, ["abcdefgh"] * 3, count=5))], alignment=1),
        "the file ends inside string 3 of 'k', which announces 5 strings",
    ),
    "array string not UTF-8": (
        gguf([array_pair("k", array(STRING, ["a", b"\xc3"]))]),
        "string 1 of 'k' is not UTF-8 (unexpected end of data)",
    ),
    "array of arrays length": (gguf([array_pair("k", struct.pack("<IQ", 9, 2**60))]), "'k' of 1152921504606846976 arr"),
    "nesting": (gguf([array_pair("k", struct.pack("<IQ", 9, 1) * 9)]), "the array 'k' is nested more than 4 deep"),
    "alignment 0": (gguf([pair("general.alignment", U32, 0)], [W], bytes(16)), "general.alignment is 0; allowed are"),
    "alignment 48": (gguf([pair("general.alignment", U32, 48)]), "general.alignment is 48; allowed are powers of two."),
    "alignment text": (gguf([pair("general.alignment", STRING, "8")]), "general.alignment is '8'; allowed are powers"),
    "tensor twice": (gguf(tensors=[W, W], data=bytes(64)), "the tensor 'w' occurs twice; names are unique"),
    "dimensions": (gguf(tensors=[tensor("w", (1,) * 5, 0, 0)]), "'w' has 5 dimensions; at most 4 are allowed"),
    "many dimensions": (gguf(tensors=[string("w") + b"\xff" * 16]), "'w' has 4294967295 dimensions; at most 4"),
    "unknown type": (gguf(tensors=[tensor("w", (32,), 999, 0)]), "'w' has the unknown type 999; allowed are ('F32', "),
    "other type": (
        gguf(tensors=[tensor("w", (256,), 15, 0)]),
        "'w' is stored as Q8_K; allowed are ('F32', 'F16', 'BF16', 'F64', 'I8', 'I16', 'I32', 'I64', 'Q4_0', "
        "'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'TQ1_0', 'TQ2_0', 'IQ1_S', 'IQ1_M', "
        "'IQ2_XXS', 'IQ2_XS', 'IQ2_S', 'IQ3_XXS', 'IQ3_S', 'IQ4_NL', 'IQ4_XS', 'MXFP4', 'NVFP4'). Convert it with "
        "llama.cpp",
    ),
    "block": (
        gguf(tensors=[tensor("w", (48, 2), TYPES["Q4_1"], 0)], data=bytes(999)),
        "'w' has shape (2, 48) and type Q4_1; the last axis must be a multiple of the block of 32.",
    ),
    "quantised scalar": (gguf(tensors=[tensor("w", (), 8, 0)], data=bytes(99)), "'w' has shape () and type Q8_0; the"),
    "impossible shape": (gguf(tensors=[tensor("w", (0, 2**63, 9), 0, 0)]), "'w' has the impossible shape (9, 922337"),
    "shape": (
        gguf(tensors=[tensor("w", (2**20, 2**20), 0, 0)], data=bytes(64)),
        "'w' (F32, shape (1048576, 1048576)) takes bytes 96 to 4398046511200; the file has 160. The file is incomplete",
    ),
    "offset": (gguf(tensors=[tensor("w", (4,), 0, 2**40)], data=bytes(64)), "takes bytes 1099511627840 to 10995116278"),
    "offset not aligned": (gguf(tensors=[tensor("w", (4,), 0, 8)], data=bytes(64)), "'w' is at offset 8; offsets are"),
    "overlap": (
        gguf(tensors=[tensor("a", (16,), 0, 0), tensor("b", (4,), 0, 32)], data=bytes(64)),
        "the tensor 'b' starts at byte 128, inside 'a', which ends at 160.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(write, case):
    data, message = BAD_HEADERS[case]
    path = write(data)
    with pytest.raises(FormatError) as error:
        open_gguf(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_truncation_anywhere_is_noticed(write):
    pairs = [
        pair("s", STRING, "text"),
        array_pair("words", array(STRING, ["a", "bc"])),
        array_pair("n", array(U8, [7])),
    ]
    whole = gguf(pairs, [tensor("w", (32, 2), TYPES["Q8_0"], 0)], data=random_blocks("Q8_0", 2))
    assert open_gguf(write(whole)).names() == ("w",)
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            open_gguf(write(whole[:length]))


def test_missing_file_directory_and_unknown_tensor(write, tmp_path):
    with pytest.raises(FormatError, match=r"absent.gguf: there is no such file. Give the path of an existing one"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(FormatError, match=r"is a directory; a file is needed. Name the file inside it"):
        open_gguf(tmp_path)
    source = open_gguf(write(gguf(tensors=[tensor("blk.0.attn_q.weight", (1,), 0, 0)], data=bytes(4))))
    with pytest.raises(FormatError, match=r"no tensor 'blk.0.attn_k.weight' among its 1; .* \['blk.0.attn_q.weight'\]"):
        source.read("blk.0.attn_k.weight")
    with pytest.raises(IndexError, match=r"'blk.0.attn_q.weight' has 1 entries along axis 0; the slice is 0:2:1"):
        source.read_slice("blk.0.attn_q.weight", (slice(0, 2),))
