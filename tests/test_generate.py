"""Generation with a cache says what repeated full forward passes would say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILY_CASES, LAYOUTS, family_models, lacking, llama

from jaxdistill.generate import Sampling, generate, sample
from jaxdistill.models.decoder import Rows, apply, apply_cached, init_cache, scores
from jaxdistill.models.schema import init_params, param_shardings
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig

PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20, 38)), [2, 6, 5]]
MODEL = llama(layers=3)
WIDE = LayerSpec(mixer=Attention(heads=2, kv_heads=1, head_dim=8, bias=True), ffn=GatedMLP(mlp=24))
MIXED = ModelConfig(family="llama", vocab=64, embed=16, layers=(*MODEL.layers[:2], WIDE, WIDE), tied=False)


def spread_out(config, seed=0):
    """Parameters whose greedy continuations are neither constant nor near ties."""
    params = init_params(config, jax.random.key(seed))
    return jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, params)


def one_row(tokens) -> Rows:
    tokens = jnp.asarray([tokens], jnp.int32)
    return Rows(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))


@pytest.mark.parametrize("config", [MODEL, MIXED], ids=["uniform", "mixed"])
def test_greedy_is_the_argmax_of_repeated_full_passes(config):
    params = spread_out(config)
    length = 32

    @jax.jit
    def following(rows, last):  # rows padded to one length: what lies behind `last` cannot be seen
        outputs = apply(config, params, rows)
        return jnp.argmax(scores(outputs.hidden[0, last], outputs.head))

    made = generate(config, params, PROMPTS, max_new_tokens=9, temperature=0)
    assert len({tuple(m) for m in made}) == len(PROMPTS)
    for prompt, continuation in zip(PROMPTS, made, strict=True):
        text = list(prompt)
        for _ in range(9):
            text.append(int(following(one_row(text + [0] * (length - len(text))), len(text) - 1)))
        assert continuation == text[len(prompt) :]


@pytest.mark.parametrize("name", ["mixed", "lacking", *FAMILY_CASES])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_hidden_states_equal_whole_rows(side, name):
    config = {"mixed": MIXED, "lacking": lacking(), **family_models()}[name]
    params = spread_out(config)
    rng = np.random.default_rng(0)
    rows, extra, longest = 3, 4, 7
    lengths = [7, 2, 5]
    texts = [rng.integers(0, config.vocab, n + extra) for n in lengths]

    def padded(column):
        """The prompts as a [rows, 7] matrix of `column(row, index)`, 0 at padding."""
        out = np.zeros((rows, longest), np.int32)
        for row, n in enumerate(lengths):
            start = longest - n if side == "left" else 0
            out[row, start : start + n] = [column(row, i) for i in range(n)]
        return jnp.asarray(out)

    prompt = Rows(padded(lambda r, i: texts[r][i]), padded(lambda r, i: i), padded(lambda r, i: 1))
    advance = jax.jit(lambda rows, cache: apply_cached(config, params, rows, cache))
    outputs, cache = advance(prompt, init_cache(config, rows, longest + extra))
    hidden = [[outputs.hidden[r, i] for i in range(longest) if prompt.segment_ids[r, i]] for r in range(rows)]
    for step in range(extra):
        tokens = jnp.asarray([[texts[r][lengths[r] + step]] for r in range(rows)])
        positions = jnp.asarray([[n + step] for n in lengths])
        outputs, cache = advance(Rows(tokens, positions, jnp.ones_like(tokens)), cache)
        for r in range(rows):
            hidden[r].append(outputs.hidden[r, 0])
    assert int(cache.used) == longest + extra
    whole = jax.jit(lambda row: apply(config, params, row).hidden[0])
    for r in range(rows):
        expected = whole(one_row([*texts[r], *[0] * (longest - lengths[r])]))[: len(texts[r])]
        np.testing.assert_allclose(jnp.stack(hidden[r]), expected, rtol=1e-5, atol=1e-5)


def test_stop_tokens_end_a_row_and_are_not_returned():
    params = spread_out(MODEL)
    free = generate(MODEL, params, PROMPTS, max_new_tokens=9, temperature=0)
    stop = frozenset({free[0][3], free[2][5]})
    stopped = generate(MODEL, params, PROMPTS, max_new_tokens=9, temperature=0, stop=stop)
    for without, with_stop in zip(free, stopped, strict=True):
        first = next((i for i, t in enumerate(without) if t in stop), len(without))
        assert with_stop == without[:first]
    assert len(stopped[0]) <= 3


def test_samples_depend_on_key_and_place_not_on_neighbours():
    params = spread_out(MODEL)
    options = {"max_new_tokens": 8, "temperature": 1.0}
    both = generate(MODEL, params, PROMPTS, key=jax.random.key(1), **options)
    assert both == generate(MODEL, params, PROMPTS, key=jax.random.key(1), **options)
    assert both != generate(MODEL, params, PROMPTS, key=jax.random.key(2), **options)
    assert both[:1] == generate(MODEL, params, PROMPTS[:1], key=jax.random.key(1), **options)


def test_a_mesh_changes_no_token():
    layout = LAYOUTS["fsdp 4 x tensor 2"]()
    expected = generate(MODEL, spread_out(MODEL), PROMPTS[:3], max_new_tokens=6, temperature=0)
    sharded = jax.device_put(spread_out(MODEL), param_shardings(MODEL, layout))
    assert generate(MODEL, sharded, PROMPTS[:3], max_new_tokens=6, temperature=0, layout=layout) == expected


def test_drawing_follows_the_filtered_distribution():
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    table = jnp.log(jnp.asarray(np.tile(probabilities, (20_000, 1)), jnp.float32))
    keys = jax.random.split(jax.random.key(0), 20_000)

    def frequencies(**options):
        return np.bincount(sample(table, keys, Sampling(**options)), minlength=5) / 20_000

    def expect(found, weights):
        weights = np.asarray(weights, float)
        np.testing.assert_allclose(found, weights / weights.sum(), atol=0.015)
        assert ((found > 0) == (weights > 0)).all()

    expect(frequencies(), probabilities)
    expect(frequencies(temperature=0.5), probabilities**2)
    expect(frequencies(temperature=0), [1, 0, 0, 0, 0])
    expect(frequencies(top_k=2), [0.4, 0.3, 0, 0, 0])
    expect(frequencies(top_p=0.75), [0.4, 0.3, 0.15, 0, 0])
    expect(frequencies(top_p=0.01), [1, 0, 0, 0, 0])
    expect(frequencies(top_k=3, top_p=0.7), [0.4, 0.3, 0, 0, 0])  # of the three kept: 0.47, 0.35, 0.18


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 64]], {}, r"prompt 0 has the token ids \[64\]; allowed are 0 to 63"),
        ([[1] * 2040], {}, "prompt 0 has 2040 tokens and 9 new ones .* at most 2048"),
        ([[1]], {"temperature": 1.0}, "no key is given"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_requests_that_cannot_be_met(prompts, options, message):
    options = {"max_new_tokens": 9, "temperature": 0.0, **options}
    with pytest.raises(ValueError, match=message):
        generate(MODEL, {}, prompts, **options)


def test_no_prompts_no_continuations():
    assert generate(MODEL, {}, [], max_new_tokens=4, temperature=0) == []
