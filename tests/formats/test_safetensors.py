import json
import struct
import subprocess
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.formats.safetensors import (
    DTYPES,
    SafetensorsFile,
    open_safetensors,
    save_safetensors,
    write_safetensors,
)
from jaxdistill.formats.source import FormatError, TensorInfo


def infos_of(tensors):
    return {name: TensorInfo(values.shape, values.dtype) for name, values in tensors.items()}


def save(directory, tensors, **options):
    return save_safetensors(directory, infos_of(tensors), lambda names: ((n, tensors[n]) for n in names), **options)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def file_bytes(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def some():
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": rng.normal(size=(7, 5)).astype(ml_dtypes.bfloat16),
        "model.layers.0.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "scalar": np.float64(3.5).reshape(()),
        "empty": np.empty((0, 4), np.float16),
        "mask": np.array([True, False, True]),
        "ids": np.array([[1, -2], [3, 4]], np.int64),
    }


def test_reads_what_the_reference_wrote(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, -1], np.int8)}
    tensors |= {"half": np.array(0.5, np.float16), "none": np.empty((3, 0), np.float64), "flag": np.array([True])}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    with open_safetensors(tmp_path) as source:
        assert isinstance(source, SafetensorsFile)
        assert source.metadata == {"format": "np"}
        assert set(source.names()) == set(tensors)
        for name, values in tensors.items():
            assert source.info(name) == TensorInfo(values.shape, values.dtype)
            np.testing.assert_array_equal(source.read(name), values, strict=True)


def test_the_reference_reads_what_we_wrote(tmp_path, some):
    (path,) = save(tmp_path, some)
    assert path == tmp_path / "model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(some)
        for name in ("model.layers.0.weight", "scalar", "empty", "mask", "ids"):
            np.testing.assert_array_equal(file.get_tensor(name), some[name], strict=True)
    # Its NumPy reader has no bfloat16, so the raw bytes are compared.
    raw = dict(safetensors.deserialize(path.read_bytes()))["model.embed_tokens.weight"]
    assert (raw["dtype"], raw["shape"]) == ("BF16", [7, 5])
    assert bytes(raw["data"]) == some["model.embed_tokens.weight"].tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_round_trips_and_has_the_reference_name(tmp_path, name):
    values = np.arange(16).reshape(4, 4).astype(DTYPES[name])
    (path,) = save(tmp_path, {"w": values})
    with open_safetensors(path) as source:
        np.testing.assert_array_equal(source.read("w").view(np.uint8), values.view(np.uint8))
        assert source.read("w").dtype == values.dtype
    ((_, raw),) = safetensors.deserialize(path.read_bytes())
    assert (raw["dtype"], bytes(raw["data"])) == (name, values.tobytes())


def test_reading_is_a_view_that_outlives_the_source(tmp_path, some):
    save(tmp_path, some)
    with open_safetensors(tmp_path) as source:
        values = source.read("ids")
    assert not values.flags.owndata
    assert not values.flags.writeable
    np.testing.assert_array_equal(values, some["ids"])
    with pytest.raises(FormatError, match="was closed"):
        source.read("ids")


def test_written_tensors_are_aligned_whatever_the_order(tmp_path):
    tensors = {
        "byte": np.ones(3, np.uint8),
        "half": np.ones(5, np.float16),
        "double": np.ones(1),
        "one": np.ones(1, "i1"),
    }
    save(tmp_path, tensors)
    with open_safetensors(tmp_path) as source:
        for name, values in tensors.items():
            assert source.read(name).flags.aligned
            np.testing.assert_array_equal(source.read(name), values, strict=True)


def test_unaligned_files_are_read(tmp_path):
    path = tmp_path / "odd.safetensors"
    values = np.array([1.5, -2.0], np.float32)
    header = json.dumps({"w": entry()}).encode()
    header += b" " * ((1 - len(header)) % 8)  # data begins at an odd byte
    path.write_bytes(file_bytes(header, values.tobytes()))
    assert (8 + len(header)) % 2 == 1
    np.testing.assert_array_equal(open_safetensors(path).read("w"), values, strict=True)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_slices_are_those_of_the_whole_tensor(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(ml_dtypes.bfloat16)
    directory = tmp_path_factory.mktemp("slices")
    save(directory, {"w": values})
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size)), data.draw(st.sampled_from([None, 1, 2]))))
    with open_safetensors(directory) as source:
        np.testing.assert_array_equal(source.read_slice("w", tuple(index)), values[tuple(index)], strict=True)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((slice(None),), r"'w' has shape \(2, 3\); the index has 1 slices, give 2"),
        (
            (slice(0, 3), slice(None)),
            r"2 entries along axis 0; the slice is 0:3:1. Allowed are 0 <= start <= st",
        ),
        ((slice(None), slice(-1, None)), r"3 entries along axis 1; the slice is -1:3:1"),
        ((slice(None), slice(None, None, -1)), r"the slice is 0:3:-1"),
    ],
)
def test_slices_that_numpy_would_clip_are_refused(tmp_path, index, message):
    save(tmp_path, {"w": np.ones((2, 3))})
    with pytest.raises(IndexError, match=message):
        open_safetensors(tmp_path).read_slice("w", index)


def test_shards_and_index(tmp_path):
    tensors = {f"layer.{i}": np.full((10,), i, np.float32) for i in range(5)}  # 40 bytes each
    tensors["large"] = np.ones(100, np.float32)
    paths = save(tmp_path, tensors, max_shard_bytes=80)
    expected = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)] + ["model.safetensors.index.json"]
    assert [path.name for path in paths] == names(tmp_path) == expected
    index = json.loads(paths[-1].read_text())
    assert index["metadata"] == {"total_size": 600}
    assert index["weight_map"] == {f"layer.{i}": expected[i // 2] for i in range(5)} | {"large": expected[3]}
    for place in (tmp_path, paths[-1]):
        with open_safetensors(place) as source:
            assert source.names() == tuple(tensors)
            for name, values in tensors.items():
                assert source.info(name) == TensorInfo(values.shape, values.dtype)
                np.testing.assert_array_equal(source.read(name), values, strict=True)
            np.testing.assert_array_equal(source.read_slice("large", (slice(3, 9),)), np.ones(6))
    for path in paths[:-1]:  # the reference reads every shard
        for name, values in safetensors.numpy.load_file(path).items():
            np.testing.assert_array_equal(values, tensors[name])


def test_exactly_one_shard_when_it_fits(tmp_path):
    tensors = {"a": np.ones(10, np.float32), "b": np.ones(10, np.float32)}
    assert [path.name for path in save(tmp_path / "fits", tensors, max_shard_bytes=80)] == ["model.safetensors"]
    assert len(save(tmp_path / "not", tensors, max_shard_bytes=79)) == 3
    with pytest.raises(ValueError, match="max_shard_bytes is 0; it must be at least 1"):
        save(tmp_path / "zero", tensors, max_shard_bytes=0)


BAD_FILES = {
    "empty": (b"", "has 0 bytes; a safetensors file has at least 8. The file is incomplete or damaged: download"),
    "short": (b"\1\0\0", "has 3 bytes; a safetensors file has at least 8."),
    "huge header": (file_bytes({}, length=100_000_001), "announces a header of 100000001 bytes; at most 100000000 are"),
    "header beyond file": (file_bytes({}, length=1000), "announces a header of 1000 bytes; the file has 10."),
    "text": (file_bytes(b"hello"), "the header is not JSON in UTF-8 (Expecting value: line 1 column 1 (char 0))."),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "the header is not JSON in UTF-8 ('utf-8' codec can't decode byte 0xff"),
    "deep": (file_bytes(b'{"a":' * 100_000), "the header is not JSON in UTF-8 (maximum recursion depth exceeded"),
    "list": (file_bytes([]), "the header is a JSON list; an object is allowed."),
    "long number": (file_bytes(b'{"w":' + b"9" * 5000 + b"}"), "the header is not JSON in UTF-8 (Exceeds the limit"),
    "duplicate": (
        file_bytes(b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}", bytes(8)),
        "the header has 'w' twice; names are unique. Write the file again.",
    ),
    "metadata": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__ must be an object of strings."),
    "entry": (file_bytes({"w": {"dtype": "F32"}}), "the entry of 'w' must be an object with dtype, shape and data_off"),
    "entry list": (file_bytes({"w": [1]}), "the entry of 'w' must be an object with dtype, shape and data_offsets"),
    "dtype": (file_bytes({"w": entry("F4")}, bytes(8)), "'w' has the unknown dtype 'F4'; allowed are BOOL, U8, I8, F8"),
    "dtype list": (file_bytes({"w": entry(["F32"])}, bytes(8)), "'w' has the unknown dtype ['F32']; allowed are BOOL"),
    "negative shape": (file_bytes({"w": entry(shape=(-2,))}, bytes(8)), "'w' has the shape [-2]; a list of counts is"),
    "boolean shape": (file_bytes({"w": entry(shape=(True, 2))}, bytes(8)), "'w' has the shape [True, 2]; a list of co"),
    "astronomical shape": (
        file_bytes({"w": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}),
        "'w' has the shape [0, 1099511627776, 1099511627776]; a list of counts is allowed.",
    ),
    "many axes": (file_bytes({"w": entry(shape=(1,) * 65, offsets=(0, 4))}, bytes(4)), "'w' has the shape [1, 1, 1, 1"),
    "three offsets": (file_bytes({"w": entry(offsets=(0, 4, 8))}, bytes(8)), "'w' has the data_offsets [0, 4, 8]; two"),
    "negative offset": (file_bytes({"w": entry(offsets=(-8, 0))}, bytes(8)), "'w' has the data_offsets [-8, 0]; two b"),
    "float offset": (file_bytes({"w": entry(offsets=(0, 8.0))}, bytes(8)), "'w' has the data_offsets [0, 8.0]; two by"),
    "bytes": (
        file_bytes({"w": entry(shape=(3,))}, bytes(8)),
        "'w' has dtype F32 and shape [3], which take 12 bytes; its data_offsets [0, 8] span 8.",
    ),
    "lying size": (
        file_bytes({"w": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(8)),
        "the data_offsets of 'w' end at byte 4398046511197; the file has 101.",
    ),
    "truncated": (file_bytes({"w": entry()}, bytes(7)), "the data_offsets of 'w' end at byte 77; the file has 76."),
    "overlap": (
        file_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "the data_offsets of 'b' begin at 4 and overlap 'a'; 8 is allowed.",
    ),
    "gap": (
        file_bytes({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
        "the data_offsets of 'b' begin at 16 and leave a gap before them; 8 is allowed.",
    ),
    "rest": (file_bytes({"w": entry()}, bytes(20)), "the tensors end at byte 77. The rest belongs to no tensor: d"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    data, message = BAD_FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError) as error:
        open_safetensors(tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def shard_two(tmp_path):
    paths = save(tmp_path, {"a": np.ones(2), "b": np.zeros(2)}, max_shard_bytes=16)
    return paths, json.loads(paths[-1].read_text())


def test_missing_shard(tmp_path):
    paths, _ = shard_two(tmp_path)
    paths[1].unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00002.safetensors is missing; .*index.json names it"):
        open_safetensors(tmp_path)


def test_tensor_in_the_index_but_not_in_the_shard(tmp_path):
    paths, index = shard_two(tmp_path)
    index["weight_map"]["c"] = paths[1].name
    paths[-1].write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"00002-of-00002.safetensors has no tensor 'c', but .*index.json says so"):
        open_safetensors(tmp_path)


def test_tensor_in_a_shard_but_not_in_the_index(tmp_path):
    paths, index = shard_two(tmp_path)
    save(tmp_path / "other", {"b": np.zeros(2), "extra": np.ones(1)})[0].rename(paths[1])
    with pytest.raises(FormatError, match=r"has the tensor 'extra', which .*index.json places in no shard. Index and"):
        open_safetensors(tmp_path)
    index["weight_map"]["extra"] = paths[1].name
    paths[-1].write_text(json.dumps(index))
    assert open_safetensors(tmp_path).names() == ("a", "b", "extra")


def test_tensor_in_two_shards(tmp_path):
    paths, _ = shard_two(tmp_path)
    save(tmp_path / "other", {"a": np.zeros(2), "b": np.ones(1)})[0].rename(paths[1])
    with pytest.raises(FormatError, match=r"has the tensor 'a', which .* places in model-00001-of-00002.safetensors"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"the index is not JSON in UTF-8"),
        ("{}", r"must have a weight_map from tensor names to shard names"),
        ('{"weight_map": {"a": 1}}', r"must have a weight_map"),
        (
            '{"weight_map": {"a": "../x.safetensors"}}',
            r"names the shard '../x.safetensors'; allowed are \*.safe",
        ),
        ('{"weight_map": {"a": "/x.safetensors"}}', r"names the shard '/x.safetensors'; allowed"),
        ('{"weight_map": {"a": "model.bin"}}', r"names the shard 'model.bin'; allowed"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', r"the index has 'a' twice"),
    ],
)
def test_bad_indexes(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        open_safetensors(tmp_path)


def test_directories_without_or_with_two_models(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"neither model.safetensors nor .*; other safetensors files there: \['ad"):
        open_safetensors(tmp_path)
    shard_two(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"has both model.safetensors and .*index.json. Give the path of the one"):
        open_safetensors(tmp_path)
    with pytest.raises(FormatError, match=r"nowhere: there is no such file"):
        open_safetensors(tmp_path / "nowhere")


def test_saving_refuses_to_mix_with_another_sharding(tmp_path):
    shard_two(tmp_path)
    before = names(tmp_path)
    with pytest.raises(FileExistsError, match=r"already has \['model-00001-of-00002.safetensors', .*Write to"):
        save(tmp_path, {"a": np.ones(2)})
    assert names(tmp_path) == before
    shard_two(tmp_path)  # the same names: replaced


W2 = TensorInfo((2,), np.dtype(np.float32))


@pytest.mark.parametrize(
    ("infos", "tensors", "message"),
    [
        ({"a": W2, "b": W2}, [("b", np.ones(2, "f4"))], r"the next tensor to write is 'a', given was 'b'"),
        ({"a": W2, "b": W2}, [("a", np.ones(2, "f4"))], r"the next tensor to write is 'b', given was 'no more tensor'"),
        ({"a": W2}, [("a", np.ones(2, "f4")), ("c", np.ones(2))], r"'c' was given, but all announced ones are written"),
        ({"a": W2}, [("a", np.ones(3, "f4"))], r"'a' was announced as float32\[2\], given was float32\[3\]"),
        ({"a": W2}, [("a", np.ones(2))], r"'a' was announced as float32\[2\], given was float64\[2\]"),
        ({"a": TensorInfo((2,), np.dtype("c16"))}, [], r"'a' has dtype complex128; safetensors holds bool, uint8"),
        ({"__metadata__": W2}, [], r"under any name but __metadata__"),
    ],
)
def test_writing_something_else_than_announced(tmp_path, infos, tensors, message):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_safetensors(path, infos, tensors)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["w.safetensors"]


def test_strided_arrays_are_written_in_their_order(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(4, 6)
    save(tmp_path, {"t": values.T, "s": values[:, ::2]})
    with open_safetensors(tmp_path) as source:
        np.testing.assert_array_equal(source.read("t"), values.T)
        np.testing.assert_array_equal(source.read("s"), values[:, ::2])


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive = []

    def stream():
        for name in ("a", "b", "c"):
            assert not any(reference() is not None for reference in alive)
            values = np.ones(1000, np.float32)
            alive.append(weakref.ref(values))
            pair = (name, values)
            del values
            yield pair
            del pair

    write_safetensors(tmp_path / "w", dict.fromkeys("abc", TensorInfo((1000,), np.dtype("f4"))), stream())
    assert len(alive) == 3


FULL_DISK = """
import resource, sys
import numpy as np
from jaxdistill.formats.paths import atomic_directory
from jaxdistill.formats.safetensors import save_safetensors
from jaxdistill.formats.source import TensorInfo

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
info = TensorInfo((20_000,), np.dtype("float32"))
values = np.zeros(20_000, np.float32)
tensors = {name: info for name in ("a", "b", "c")}
with atomic_directory(sys.argv[1], replace=True) as folder:
    save_safetensors(folder, tensors, lambda names: ((n, values) for n in names), max_shard_bytes=int(sys.argv[2]))
"""


@pytest.mark.parametrize("max_shard_bytes", [10**9, 160_000], ids=["one file", "second shard"])
def test_full_disk_keeps_the_old_model(tmp_path, max_shard_bytes):
    """The operating system refuses a file past 100 kB; a model that was there before is as it was."""
    rng = np.random.default_rng(1)
    old = {name: rng.normal(size=20_000).astype(np.float32) for name in "abc"}
    paths = save(tmp_path, old, max_shard_bytes=max_shard_bytes)
    before = {path.name: path.read_bytes() for path in paths}
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(max_shard_bytes)], capture_output=True, text=True
    )
    assert process.returncode == 1
    assert "OSError: [Errno 27] File too large" in process.stderr
    assert "was not written: it is as it was before, and no partial" in process.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_that_are_there_are_not_made_again(tmp_path):
    """Nobody asks for their tensors."""
    tensors = {name: np.full(100, ord(name), np.float32) for name in "abcd"}
    asked, done = [], set()

    def given(names):
        for name in names:
            asked.append(name)
            if len(asked) == 3:
                raise KeyboardInterrupt
            yield name, tensors[name]

    with pytest.raises(KeyboardInterrupt):
        save_safetensors(tmp_path, infos_of(tensors), given, max_shard_bytes=800, done=done)
    assert done == {"model-00001-of-00002.safetensors"}
    assert not (tmp_path / "model.safetensors.index.json").exists()
    save_safetensors(tmp_path, infos_of(tensors), given, max_shard_bytes=800, done=done)
    assert asked == ["a", "b", "c", "c", "d"]
    with open_safetensors(tmp_path) as source:
        assert all((source.read(name) == tensors[name]).all() for name in "abcd")
