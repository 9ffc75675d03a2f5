"""The longest token that ends at each byte, against a search of every suffix; and a model that reads it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LAYOUTS, MODEL_MESHES, assert_gradients_close, llama
from tiny import params as tiny_params

from jaxdistill.checkpoint.model import load_model_checkpoint, save_model
from jaxdistill.generate import generate
from jaxdistill.models.decoder import Rows, apply, apply_cached, init_cache, scores
from jaxdistill.models.export import check_exportable
from jaxdistill.models.families.family import ConfigError
from jaxdistill.models.schema import count_parameters, init_params, param_shardings, weights
from jaxdistill.models.suffixes import NONE, WINDOW, build_trie, empty_trie, longest_suffixes
from jaxdistill.optimizer import AdamW
from jaxdistill.sharding import Layout, put_batch
from jaxdistill.specs import SuffixTable
from jaxdistill.types import Tap

SPECIAL = {256: 700, 259: 3}
VOCAB = 304


def look_up(ids, special, rows, segments) -> np.ndarray:
    trie = build_trie(ids, special, vocab=VOCAB)
    return np.asarray(jax.jit(functools.partial(longest_suffixes, vocab=VOCAB))(trie, np.asarray(rows), segments))


def random_vocabulary(rng: np.random.Generator) -> dict[bytes, int]:
    """Tokens of few different bytes, some longer than the window, and two of the bytes in no token at all."""
    tokens = {bytes(rng.integers(97, 100, rng.integers(1, WINDOW + 4)).tolist()) for _ in range(400)} - {b"b"}
    return {token: 10 + number for number, token in enumerate(sorted(tokens, key=lambda _: rng.random()))}


def definition(ids, row, segments) -> list[int]:
    found = []
    for at, token in enumerate(row):
        if token >= 256:
            found.append(SPECIAL.get(token, NONE))
            continue
        start = at
        while start > 0 and row[start - 1] < 256 and segments[start - 1] == segments[at]:
            start -= 1
        suffixes = (bytes(row[begin : at + 1]) for begin in range(max(start, at + 1 - WINDOW), at + 1))
        found.append(next((ids[suffix] for suffix in suffixes if suffix in ids), NONE))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_ids_are_those_of_a_search_of_every_suffix(seed):
    rng = np.random.default_rng(seed)
    ids = random_vocabulary(rng)
    rows = rng.integers(97, 102, (6, 200)).astype(np.int32)
    rows[rng.random(rows.shape) < 0.05] = 256
    rows[rng.random(rows.shape) < 0.02] = 300  # nothing stands for it
    rows[0, :40] = [97, 98] * 20  # longer than every window
    segments = np.cumsum(rng.random(rows.shape) < 0.05, axis=1).astype(np.int32)
    found = look_up(ids, SPECIAL, rows, segments)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [definition(ids, *each) for each in zip(rows.tolist(), segments, strict=True)])
    lengths = [len(token) for token, id in ids.items() if id in set(found.ravel().tolist())]
    assert max(lengths) > 4
    assert (found == NONE).any()


def test_no_token_reaches_over_the_beginning_of_a_document():
    """Packed rows: what a document's first byte is given depends on no other document."""
    ids = {b"a": 1, b"b": 2, b"ab": 3, b"bab": 4}
    row = np.frombuffer(b"abab", np.uint8).astype(np.int32)
    together, apart = look_up(ids, {}, [row, row], np.array([[1, 1, 1, 1], [1, 1, 2, 2]])).tolist()
    assert together == [1, 3, 1, 4]
    assert apart == [1, 3, 1, 3]
    assert look_up(ids, {}, row.reshape(2, 2), np.ones((2, 2), int)).tolist() == [[1, 3], [1, 3]]


def test_a_special_token_is_itself_and_ends_what_was_before():
    row = [[97, 97, 256, 97, 259, 258, 97, 303]]
    found = look_up({b"a": 1, b"aa": 2}, SPECIAL, row, np.ones((1, 8), int))
    assert found.tolist() == [[1, 2, 700, 1, 3, NONE, 1, NONE]]


def test_the_longest_within_the_window():
    ids = {b"a" * length: length for length in (1, 15, 16, 17)}
    found = look_up(ids, {}, np.full((1, 20), 97), np.ones((1, 20), int))
    assert found.tolist() == [[1] * 14 + [15] + [16] * 5]


def test_every_byte_and_the_largest_ids_are_found():
    """Both ends of every word of bits, and ids that would not fit into fewer of them."""
    ids = {bytes([byte]): 262_144 + byte for byte in range(256)} | {bytes([byte, byte]): byte for byte in range(256)}
    row = np.repeat(np.arange(256), 2)[None]
    expected = np.stack([262_144 + np.arange(256), np.arange(256)], axis=1).reshape(1, -1)
    np.testing.assert_array_equal(look_up(ids, {}, row, np.ones_like(row)), expected)


def test_an_empty_trie_finds_nothing():
    trie = empty_trie(jax.random.key(0), (1 + VOCAB - 256, 10), jnp.int32)
    found = longest_suffixes(trie, jnp.array([[97, 0, 256, 303]]), jnp.ones((1, 4), int), vocab=VOCAB)
    assert found.tolist() == [[NONE] * 4]


# A model that adds the embedding of what is found to its input.

IDS = {bytes([97 + a, 97 + b][:n]): 3 * a + b + 9 * (n - 1) for a in range(3) for b in range(3) for n in (1, 2)}
TRIE = build_trie(IDS, {256: 20}, vocab=264)
CONFIG = dataclasses.replace(llama(vocab=264), suffixes=SuffixTable(vocab=24, nodes=len(TRIE)))


def reading_suffixes():
    params = tiny_params(CONFIG)
    params["suffixes"]["trie"] = jnp.asarray(TRIE)
    params["suffixes"]["embedding"]["kernel"] *= 10  # or it would hardly be seen
    return params


def rows_of_bytes(rows: int = 8, length: int = 16) -> Rows:
    """Two documents of few different bytes in every row, a special token here and there, and padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(97, 101, (rows, length))
    tokens[rng.random(tokens.shape) < 0.1] = 256
    at = np.arange(length)
    segments = np.broadcast_to(np.where(at < 7, 1, np.where(at < 14, 2, 0)), tokens.shape)
    return Rows(*(np.asarray(x, np.int32) for x in (tokens, np.broadcast_to(at, tokens.shape), segments)))


def test_the_input_is_the_sum_of_both_embeddings():
    params, rows = reading_suffixes(), rows_of_bytes()
    found = look_up(IDS, {256: 20}, rows.tokens, rows.segment_ids)
    assert (found == NONE).any()
    assert (found > 8).any()
    second = np.where((found == NONE)[..., None], 0, np.asarray(params["suffixes"]["embedding"]["kernel"])[found])
    read = {"input": Tap(points=("input",), reduce=lambda values, mask: values["input"], layers=(0,))}
    given = apply(CONFIG, params, rows, taps=read).taps["input"][0]
    np.testing.assert_allclose(given, np.asarray(params["embedding"]["kernel"])[rows.tokens] + second, rtol=1e-6)


@pytest.mark.parametrize("name", MODEL_MESHES)
def test_every_mesh_gives_the_same(name):
    """Also where a row, and so the bytes of a token, is spread over devices."""
    layout, rows = LAYOUTS[name](), rows_of_bytes()

    def gradients(layout, params, rows):
        def loss(learned):
            given = {**params, "suffixes": {**params["suffixes"], "embedding": learned}}
            hidden = apply(CONFIG, given, rows, layout=layout).hidden
            return jnp.sum(jnp.sin(hidden) * (rows.segment_ids > 0)[..., None]), hidden

        return jax.grad(loss, has_aux=True)(params["suffixes"]["embedding"])

    expected, hidden = jax.jit(functools.partial(gradients, Layout()))(reading_suffixes(), rows)
    assert np.abs(expected["kernel"]).max() > 0.01
    placed = jax.device_put(reading_suffixes(), param_shardings(CONFIG, layout))
    given, found = jax.jit(functools.partial(gradients, layout))(placed, put_batch(layout, rows))
    assert_gradients_close(given, expected)
    np.testing.assert_allclose(found, hidden, rtol=1e-5, atol=1e-5)


def test_a_cache_remembers_the_bytes_before():
    """Prompts padded on the left, continued byte by byte: as whole rows."""
    params, text = reading_suffixes(), [97, 98, 99, 98, 256, 97, 97, 98]
    tokens = np.array([text, [0, 0, *text[:6]]], np.int32)
    starts = np.array([[0], [2]])
    positions = np.maximum(np.arange(8) - starts, 0).astype(np.int32)
    rows = Rows(tokens, positions, (np.arange(8) >= starts).astype(np.int32))
    whole = jax.jit(functools.partial(apply, CONFIG))(params, rows).hidden
    advance, cache = jax.jit(functools.partial(apply_cached, CONFIG)), init_cache(CONFIG, 2, 8)
    parts = []
    for piece in (slice(0, 5), *(slice(at, at + 1) for at in range(5, 8))):
        outputs, cache = advance(params, jax.tree.map(lambda x, piece=piece: x[:, piece], rows), cache)
        parts.append(outputs.hidden)
    given = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(given[0], whole[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(given[1, 2:], whole[1, 2:], rtol=1e-5, atol=1e-5)


def test_greedy_generation_is_the_argmax_of_whole_rows():
    """The loop reads the bytes that it has just made."""
    params, prompts = reading_suffixes(), [[97, 98, 99], [98]]
    made = generate(CONFIG, params, prompts, max_new_tokens=5, temperature=0)
    whole = jax.jit(functools.partial(apply, CONFIG))
    for prompt, continuation in zip(prompts, made, strict=True):
        row = np.array([[*prompt, *continuation]], np.int32)
        outputs = whole(params, Rows(row, np.arange(row.shape[1])[None], np.ones_like(row)))
        best = np.argmax(scores(outputs.hidden[0], outputs.head), axis=-1)
        np.testing.assert_array_equal(best[len(prompt) - 1 : -1], continuation)


def test_the_trie_is_no_weight():
    without = dataclasses.replace(CONFIG, suffixes=None)
    assert count_parameters(CONFIG) == count_parameters(without) + 24 * CONFIG.embed
    assert not weights(CONFIG)("suffixes.trie")
    assert weights(CONFIG)("suffixes.embedding.kernel")
    assert init_params(CONFIG, jax.random.key(0), dtype="bfloat16")["suffixes"]["trie"].dtype == jnp.int32


def test_saved_and_read_in_another_dtype(tmp_path):
    save_model(tmp_path / "model", CONFIG, reading_suffixes())
    config, params = load_model_checkpoint(tmp_path / "model", layout=Layout(), dtype="bfloat16")
    assert config == CONFIG
    assert params["suffixes"]["embedding"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["suffixes"]["trie"], TRIE)


def test_the_old_embedding_does_not_decay():
    """As no embedding does: rows that are never looked up would shrink."""
    tree = {"student": {"suffixes": {"embedding": {"kernel": 0}}, "segments": {"0": {"ffn": {"up": {"kernel": 0}}}}}}
    assert AdamW(learning_rate=1.0)._decayed(tree) == {
        "student": {
            "suffixes": {"embedding": {"kernel": False}},
            "segments": {"0": {"ffn": {"up": {"kernel": True}}}},
        }
    }


def test_no_hugging_face_format_holds_it():
    with pytest.raises(ConfigError, match="longest token that ends at each byte"):
        check_exportable(CONFIG)
