"""A model for another tokenizer: which old tokens a new one is made of, and the tables that follow."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LAYOUTS, llama, slow
from tiny import params as tiny_params

from jaxdistill import retokenize
from jaxdistill.models.schema import abstract_params, param_shardings
from jaxdistill.models.suffixes import longest_suffixes
from jaxdistill.retokenize import carried_ids, decompose, map_vocabulary, retokenize_model
from jaxdistill.sharding import DEFAULT_RULES, Layout, MeshConfig, make_mesh
from jaxdistill.tokenizers import ByteTokenizer
from jaxdistill.tokenizers.base import Encoding, SpecialTokens, special_tokens
from jaxdistill.tokenizers.vocabulary import ordinary_ids

SINGLE = [bytes([byte]) for byte in range(256)]


class Toy:
    """The longest token from the end on, after a space that is no part of the text if there is a prefix."""

    def __init__(self, tokens: Sequence[bytes], special: SpecialTokens, *, prefix: bool = False):
        self.tokens, self.special, self.prefix = list(tokens), special, prefix
        self.vocab_size = len(tokens)

    def token_bytes(self) -> list[bytes]:
        return self.tokens

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        return [self._encode((" " if self.prefix and text else "") + text) for text in texts]

    def _encode(self, text: str) -> Encoding:
        data, ids, known = text.encode(), [], ordinary_ids(self)
        while data:
            start = next((start for start in range(len(data)) if data[start:] in known), len(data) - 1)
            ids.insert(0, known.get(data[start:], self.special.unk))
            data = data[:start]
        return Encoding(np.array(ids, np.int32), np.zeros((len(ids), 2), np.int64))


def toy(tokens: Sequence[bytes], special: Sequence[str] = (), *, prefix=False, **roles: str) -> Toy:
    """Special tokens come first; roles name them."""
    named = {text: index for index, text in enumerate(special)}
    ids = {role: named[text] for role, text in roles.items()}
    return Toy([*(text.encode() for text in special), *tokens], special_tokens(named, **ids), prefix=prefix)


def spelled(tokenizer: Toy, ids: Sequence[int]) -> list[bytes]:
    return [tokenizer.token_bytes()[token] for token in ids]


WORDS = [b" the", b"the", b"foo", b" ", b"A", b"bar", b"ba", b"ab", b" b", b"\xe2\x96", "ﬁ".encode()]
OLD = ["<unk>", "<s>", "</s>"]


def falling_back(**changes) -> Toy:
    """As SentencePiece models are: all bytes, then words, one of which is a single byte as well."""
    roles = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    return toy([*SINGLE, *WORDS], OLD, **{**roles, "prefix": True, **changes})


def test_a_dummy_prefix_space_is_not_added_twice():
    """The new " the" is the old " the", and a continuation has no space before it."""
    old = falling_back()
    assert spelled(old, old.encode_batch(["the"])[0].ids) == [b" the"]
    new = [b" the", b"the", b" foo", b"foobar", b"  foo", b" bar", b"\nthe"]
    assert [spelled(old, ids) for ids in decompose(new, old)] == [
        [b" the"],
        [b"the"],
        [b" ", b"foo"],
        [b"foo", b"bar"],
        [b" ", b" ", b"foo"],
        [b" ", b"bar"],
        [b"\n", b"the"],
    ]
    # As the tokenizer reads it; the longest tokens from left to right would be others.
    assert [spelled(old, ids) for ids in decompose([b"foobab"], old)] == [[b"foo", b"b", b"ab"]]
    without_line_breaks = toy([b" ", b" b", b"bar", b"a", b"r"], ["<unk>"], prefix=True, unk="<unk>")
    assert spelled(without_line_breaks, decompose([b" bar"], without_line_breaks)[0]) == [b" ", b"bar"]
    rows = map_vocabulary(old, toy([b" the", b"the"]))
    assert rows.kinds == ("exact", "exact")


def test_a_real_token_wins_over_a_byte_that_is_spelled_alike():
    after, before = ordinary_ids(toy([*SINGLE, b"A", b" "])), ordinary_ids(toy([b"A", b" ", *SINGLE]))
    assert (after[b"A"], after[b" "], after[b"B"]) == (256, 257, ord("B"))
    assert (before[b"A"], before[b" "], before[b"B"]) == (0, 1, 2 + ord("B"))
    assert ordinary_ids(toy([b"x", b"x", b""])) == {b"x": 0}
    assert ordinary_ids(toy([b"<s>"], ["<s>"])) == {b"<s>": 1}


def test_bytes_that_are_no_text_are_read_by_the_longest_tokens():
    old = falling_back()
    new = [b"\xe2\x96\x81\x82", b"\xff", b"fi", "ﬁx".encode()]
    assert [spelled(old, ids) for ids in decompose(new, old)] == [
        [b"\xe2\x96", b"\x81", b"\x82"],
        [b"\xff"],
        [b"f", b"i"],
        ["ﬁ".encode(), b"x"],
    ]
    few = toy([b"a", b"ab"], ["<unk>"], unk="<unk>")
    assert [spelled(few, ids) for ids in decompose([b"xaby", b"xyz", b""], few)] == [[b"ab"], [], []]


def test_special_tokens_by_role_then_by_string():
    old = toy(
        [b"a"],
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "</s>"],
        bos="<|im_start|>",
        eos="<|im_end|>",
        unk="<|endoftext|>",
        pad="<|im_end|>",
    )
    new = toy(
        [b"a", b"</s>"],
        ["<pad>", "<s>", "</s>", "<unk>", "<end_of_turn>", "<|im_start|>", "<|endoftext|>", "<tool>", "<new>"],
        bos="<s>",
        eos="</s>",
        unk="<unk>",
        pad="<pad>",
    )
    rows = map_vocabulary(old, new)
    named = dict(zip(new.token_bytes(), zip(rows.sources, rows.kinds, strict=True), strict=True))
    assert named[b"<s>"] == ((1,), "role")
    # An end is one, also where the old tokenizer has its string for something else.
    assert (rows.sources[2], rows.kinds[2]) == ((2,), "role")
    assert named[b"<unk>"] == ((0,), "role")
    assert named[b"<pad>"] == ((2,), "role")
    assert named[b"<end_of_turn>"] == ((2,), "role")
    assert named[b"<|im_start|>"] == ((1,), "exact")
    assert named[b"<tool>"] == ((3,), "exact")
    assert named[b"<new>"] == ((), "drawn")
    assert named[b"a"] == ((5,), "exact")
    # Text that looks like a special token is text.
    assert rows.kinds[-1] == "drawn"
    assert rows.counts == {"role": 5, "exact": 4, "drawn": 2}
    padded = toy([], ["<|endoftext|>"], pad="<|endoftext|>")
    assert map_vocabulary(old, padded).sources == ((0,),)
    assert map_vocabulary(toy([b"a"], ["</s>"], eos="</s>"), toy([], ["<|im_end|>"])).sources == ((0,),)


def test_what_ends_a_text_under_another_name_is_the_end():
    old = toy([b"a"], ["<unk>", "<s>", "</s>"], unk="<unk>", bos="<s>", eos="</s>")
    new = toy([], ["<|im_end|>", "<|endoftext|>"], eos="<|im_end|>", unk="<|endoftext|>")
    assert map_vocabulary(old, new).sources == ((2,), (2,))
    one = toy([], ["<|endoftext|>"], bos="<|endoftext|>", eos="<|endoftext|>")
    assert map_vocabulary(old, one).sources == ((2,),)


def test_special_tokens_are_carried_over_by_what_they_do():
    """The teacher's end is the student's end, however they are spelled, and no ordinary token is either."""
    teacher = toy([b"</s", b"im_end", b"hey"], ["</s>", "<unk>"], eos="</s>", unk="<unk>")
    student = toy([b"</s>", b"he"], ["<|im_end|>", "<new>"], eos="<|im_end|>")
    assert carried_ids(student, teacher).tolist() == [0, -1, 2, 4]


NEW = toy(
    [b" the", b"foobar", b"A", b"\xe2\x96\x81", *(bytes([200, 200 + i % 50]) for i in range(30)), b"bars"],
    ["<s>"],
    bos="<s>",
)
WHOLE = DEFAULT_RULES.replace(heads=None, kv_heads=None, mlp=None)
TABLES = {
    **{name: LAYOUTS[name] for name in ("one device", "fsdp 8", "fsdp 4 x tensor 2", "sequence 2 x fsdp 4")},
    "embed over tensor": lambda: Layout(
        make_mesh(MeshConfig(fsdp=2, tensor=4)), WHOLE.replace(vocab=None, embed=("fsdp", "tensor"))
    ),
    "vocab over fsdp": lambda: Layout(
        make_mesh(MeshConfig(fsdp=2, tensor=4)), WHOLE.replace(vocab="fsdp", embed="tensor")
    ),
    "tensor 8": lambda: Layout(make_mesh(MeshConfig(fsdp=1, tensor=8))),
}


def old_model(*, tied: bool, layout: Layout = Layout(), dtype="float32", more: int = 2):
    """Some more ids than the tokenizer has, with rows that must not count; 2 make 272, which 8 devices divide."""
    old = falling_back()
    config = llama(vocab=old.vocab_size + more, embed=16, tied=tied)
    params = jax.tree.map(lambda x: x.astype(dtype), tiny_params(config))
    for name in ("embedding", "head")[: 1 if tied else 2]:
        params[name]["kernel"] = params[name]["kernel"].at[old.vocab_size :].set(1e6)
    return old, config, jax.device_put(params, param_shardings(config, layout))


def moved(table: np.ndarray, rows, vocab: int) -> np.ndarray:
    """The new table by its definition, in float64; not a number where a row is drawn."""
    table = np.asarray(table, np.float64)
    made = [table[list(ids)].mean(0) if ids else np.full(table.shape[1], np.nan) for ids in rows.sources]
    return np.stack(made + [np.full(table.shape[1], np.nan)] * (vocab - len(made)))


@pytest.mark.parametrize(("block", "more"), [(4096, 2), (7, 5)])
@pytest.mark.parametrize("layout", TABLES)
def test_tables_follow_their_definition_on_every_mesh(layout, block, more, monkeypatch):
    monkeypatch.setattr(retokenize, "BLOCK_ROWS", block)
    place = TABLES[layout]()
    old, config, params = old_model(tied=False, layout=place, more=more)
    changed, made, rows = retokenize_model(config, params, old, NEW, layout=place, key=jax.random.key(1), multiple=8)
    assert (changed.vocab, NEW.vocab_size) == (40, 36)
    one = retokenize_model(*old_model(tied=False, more=more)[1:], old, NEW, key=jax.random.key(1), multiple=8)[1]
    for name in ("embedding", "head"):
        table = made[name]["kernel"]
        expected = moved(params[name]["kernel"], rows, 40)
        known = ~np.isnan(expected)
        np.testing.assert_allclose(np.asarray(table)[known], expected[known], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(table, one[name]["kernel"], rtol=1e-5, atol=1e-6)
        assert np.isfinite(table).all()
        assert table.sharding == param_shardings(changed, place)[name]["kernel"]
    assert {"role", "exact", "decomposed"} == set(rows.kinds)
    for part in ("segments", "final_norm"):
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (made[part], params[part])), strict=True))


def test_a_tied_table_in_its_dtype():
    old, config, params = old_model(tied=True, dtype="bfloat16")
    changed, made, rows = retokenize_model(config, params, old, NEW, key=jax.random.key(1))
    assert changed.vocab == NEW.vocab_size
    assert "head" not in made
    table = made["embedding"]["kernel"]
    assert table.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(table, np.float64), moved(params["embedding"]["kernel"], rows, 36), rtol=1e-2)


def test_unknown_rows_are_drawn_as_the_old_ones_are_spread():
    old = toy([b"a", b"b", b"c"])
    config = llama(vocab=5, embed=16, tied=False)
    params = tiny_params(config)
    for name in ("embedding", "head"):
        params[name]["kernel"] = params[name]["kernel"].at[3:].set(1e6)
    new = toy([bytes([200, 128 + i // 100, 128 + i % 100]) for i in range(4000)])
    _, made, rows = retokenize_model(config, params, old, new, key=jax.random.key(1))
    assert rows.counts == {"drawn": 4000}
    for name in ("embedding", "head"):
        known, drawn = np.asarray(params[name]["kernel"])[:3], np.asarray(made[name]["kernel"])
        np.testing.assert_allclose(drawn.mean(0), known.mean(0), atol=4 * known.std(0).max() / 4000**0.5)
        np.testing.assert_allclose(drawn.std(0), known.std(0), rtol=0.06)
    noise = [(made[n]["kernel"] - params[n]["kernel"][:3].mean(0)) for n in ("embedding", "head")]
    assert abs(np.corrcoef(*(np.ravel(x) for x in noise))[0, 1]) < 0.05


def test_rows_of_padding_take_less_than_their_share():
    """Zeros take almost everything where all other scores are negative."""
    old, config, params = old_model(tied=False)
    changed, made, _ = retokenize_model(config, params, old, NEW, key=jax.random.key(1), multiple=64)
    head, real = np.asarray(made["head"]["kernel"], np.float64), NEW.vocab_size
    assert changed.vocab == 64
    hidden = np.random.default_rng(0).standard_normal((100, 16)) * 10
    hidden[0] = -100 * head[:real].mean(0)
    scores = hidden @ head.T
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert probabilities[:, real:].max() <= 1 / 64 + 1e-6


def test_no_device_holds_a_whole_table():
    layout = Layout(make_mesh(MeshConfig(fsdp=1, tensor=8)))
    old = toy([bytes([200, i // 256, i % 256]) for i in range(2048)])
    rows = map_vocabulary(old, old)
    move = retokenize._mover(layout, shape=(2048, 24), old_ids=2048, new_ids=2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retokenize, "BLOCK_ROWS", 64)
        entries = retokenize._entries(rows, retokenize._block_starts(layout, (2048, 24)))
        table = jax.ShapeDtypeStruct((2048, 24), jnp.float32, sharding=layout.sharding(("vocab", "embed"), (2048, 24)))
        program = move.lower(table, jax.random.key(0), np.zeros(2048, bool), *entries).compile().as_text()
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"f32\[([\d,]+)\]", program)}
    assert 256 * 24 in sizes  # a shard
    assert max(sizes) < 2 * 256 * 24


@pytest.mark.parametrize("layout", ["one device", slow("fsdp 4 x tensor 2")])
def test_a_model_of_bytes_may_keep_the_old_embedding(layout):
    """The very array, and a trie that finds its tokens; special ones by what they do."""
    place = LAYOUTS[layout]()
    old, config, params = old_model(tied=True, layout=place)
    new = ByteTokenizer()
    changed, made, _ = retokenize_model(
        config, params, old, new, key=jax.random.key(1), layout=place, multiple=8, suffixes=True
    )
    assert made["suffixes"]["embedding"]["kernel"] is params["embedding"]["kernel"]
    assert (changed.vocab, changed.suffixes.vocab) == (264, config.vocab)
    shapes = jax.tree.map(lambda x: (x.shape, x.sharding), made)
    assert shapes == jax.tree.map(
        lambda x, place: (x.shape, place), abstract_params(changed), param_shardings(changed, place)
    )
    row = np.array([[*b"foo bar", new.special.eos]])
    found = longest_suffixes(made["suffixes"]["trie"], row, np.ones_like(row), vocab=changed.vocab)
    assert spelled(old, found[0]) == [b"f", b"o", b"foo", b" ", b" b", b"ba", b"bar", b"</s>"]
    with pytest.raises(ValueError, match="move the model that it was made from"):
        retokenize_model(changed, made, new, NEW, key=jax.random.key(0))
    with pytest.raises(ValueError, match='use the tokenizer "bytes"'):
        retokenize_model(config, params, old, NEW, key=jax.random.key(0), suffixes=True)


def test_a_tokenizer_of_another_model_is_refused():
    old, config, params = old_model(tied=True)
    wide = toy([bytes([200, i // 256, i % 256]) for i in range(400)])
    with pytest.raises(ValueError, match="the model has 272 ids, its tokenizer 400"):
        retokenize_model(config, params, wide, old, key=jax.random.key(0))
    with pytest.raises(ValueError, match="a multiple of at least 1"):
        retokenize_model(config, params, old, NEW, key=jax.random.key(0), multiple=0)
