"""The default teacher's GGUF against direct NumPy definitions and the facts that are known of it."""

import time

import numpy as np
import pytest

from jaxdistill.assets import ASSETS, cache_directory
from jaxdistill.formats.gguf import open_gguf

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def path():
    path = cache_directory() / "smollm2" / ASSETS["smollm2"].files[0].name
    assert path.is_file(), f"{path} is missing; run `python tools/fetch_assets.py smollm2`."
    return path


def raw_blocks(path, source, name, stored_bytes):
    """The tensor's bytes, found by the order of offsets that the source's sizes imply, read with plain file I/O."""
    values = np.fromfile(path, np.uint8)
    tail = sum(-(-source.stored_bytes(other) // 32) * 32 for other in source.names())
    at = values.size - tail
    for other in source.names():
        if other == name:
            return values[at : at + source.stored_bytes(name)].reshape(-1, stored_bytes)
        at += -(-source.stored_bytes(other) // 32) * 32
    raise AssertionError(name)


def test_what_the_file_holds(path):
    with open_gguf(path) as source:
        names = source.names()
        assert len(names) == 272
        assert sum(source.info(name).size for name in names) == 134_515_008
        encodings = [source.encoding(name) for name in names]
        assert {kind: encodings.count(kind) for kind in set(encodings)} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
        assert source.info("token_embd.weight").shape == (49152, 576)
        assert source.info("blk.29.ffn_down.weight").shape == (576, 1536)
        assert source.info("blk.0.attn_k.weight").shape == (192, 576)
        metadata = source.metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 30
    assert metadata["llama.attention.head_count_kv"] == 3
    assert metadata["llama.rope.freq_base"] == 1e5
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == 49152
    assert len(metadata["tokenizer.ggml.merges"]) == 48900
    assert metadata["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.17.ffn_down.weight", "blk.29.attn_k.weight"])
def test_q4_1_is_its_definition(path, name):
    with open_gguf(path) as source:
        blocks = raw_blocks(path, source, name, 20)
        scale, smallest = (blocks[:, at : at + 2].copy().view("<f2").astype(np.float32) for at in (0, 2))
        quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        expected = (scale * quants + smallest).reshape(source.info(name).shape)
        np.testing.assert_array_equal(source.read(name), expected, strict=True)


def test_q8_0_is_its_definition(path):
    with open_gguf(path) as source:
        blocks = raw_blocks(path, source, "token_embd.weight", 34)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        expected = (scale * blocks[:, 2:].view(np.int8)).reshape(49152, 576)
        np.testing.assert_array_equal(source.read("token_embd.weight"), expected, strict=True)
        part = source.read_slice("token_embd.weight", (slice(1000, 1100), slice(50, 100)))
        np.testing.assert_array_equal(part, expected[1000:1100, 50:100], strict=True)


def test_reading_everything_takes_seconds(path):
    """Processor time of this process: the machine's other work does not count."""
    start = time.process_time()
    with open_gguf(path) as source:
        total = sum(source.read(name).size for name in source.names())
    assert total == 134_515_008
    assert time.process_time() - start < 4
