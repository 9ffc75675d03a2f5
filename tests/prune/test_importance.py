"""Importance by its definition, from whole activations; streamed, on meshes and beside padding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LAYOUTS, llama, packed_batch
from tiny import params as tiny_params

from jaxdistill.models.decoder import apply
from jaxdistill.models.schema import param_shardings
from jaxdistill.prune.importance import Moments, add, importance, importance_taps
from jaxdistill.sharding import Layout, put_batch
from jaxdistill.types import Tap

THIN = llama(layers=1, mlp=20).layers[0]
CONFIG = dataclasses.replace(llama(layers=2), layers=(*llama(layers=2).layers, THIN))
"""Two segments: the last layer has fewer neurons."""


def measured(batches, *, layout: Layout | None = None, sequence="mean", batch="l2"):
    layout = layout or Layout()
    params = jax.device_put(tiny_params(CONFIG), param_shardings(CONFIG, layout))
    taps = importance_taps(CONFIG, sequence=sequence)
    run = jax.jit(lambda params, rows: apply(CONFIG, params, rows, layout=layout, taps=taps).taps)
    sums = None
    for rows in batches:
        found = run(params, put_batch(layout, jax.tree.map(np.asarray, rows)))
        sums = found if sums is None else add(sums, found)
    return importance(CONFIG, sums, batch=batch)


@pytest.fixture(scope="module")
def activations():
    """{point: one array [batch, length, ...] for each layer} of the batch below, float64."""
    points = ("mixer_normed", "heads", "ffn_normed", "mlp")
    keep = {
        name: Tap(points=points, reduce=lambda values, mask: dict(values), layers=layers)
        for name, layers in {"0": (0, 1), "1": (2,)}.items()
    }
    taps = apply(CONFIG, tiny_params(CONFIG), packed_batch(1), taps=keep).taps
    return {p: [np.asarray(layer, np.float64) for name in keep for layer in taps[name][p]] for p in points}


SEQUENCE = {
    "mean": lambda tokens: np.abs(tokens).mean(0),
    "l2": lambda tokens: np.sqrt((tokens**2).sum(0)),
    "variance": lambda tokens: tokens.var(0),
}
BATCH = {
    "mean": lambda rows: np.mean(rows, 0),
    "l2": lambda rows: np.sqrt(np.sum(np.square(rows), 0)),
    "variance": lambda rows: np.var(rows, 0),
}


@pytest.mark.parametrize(("sequence", "batch"), [("mean", "l2"), ("l2", "mean"), ("variance", "variance")])
def test_scores_are_those_of_the_definition(activations, sequence, batch):
    rows = packed_batch(1)
    real = np.asarray(rows.segment_ids) > 0

    def score(values):
        return BATCH[batch]([SEQUENCE[sequence](row[seen]) for row, seen in zip(values, real, strict=True)])

    found = measured([rows], sequence=sequence, batch=batch)
    expected_embed = sum(score(values) for p in ("mixer_normed", "ffn_normed") for values in activations[p])
    np.testing.assert_allclose(found.embed, expected_embed, rtol=1e-4)
    for layer in range(3):
        heads = np.sqrt((score(activations["heads"][layer]) ** 2).sum(-1))
        np.testing.assert_allclose(found.widths["mlp"][layer], score(activations["mlp"][layer]), rtol=1e-4)
        np.testing.assert_allclose(found.widths["heads"][layer], heads, rtol=1e-4)
        groups = np.sqrt((heads.reshape(2, 2) ** 2).sum(-1))
        np.testing.assert_allclose(found.widths["kv_heads"][layer], groups, rtol=1e-4)
    assert found.layers.shape == (3,)


def assert_equal(left, right):
    for a, b in zip(jax.tree.leaves(dataclasses.asdict(left)), jax.tree.leaves(dataclasses.asdict(right)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("batch", ["l2", "variance"])
def test_many_batches_are_one_large_batch(batch):
    rows = packed_batch(1)
    parts = [jax.tree.map(lambda x, at=at: x[at : at + 2], rows) for at in range(0, 8, 2)]
    assert_equal(measured(parts, batch=batch), measured([rows], batch=batch))


@pytest.mark.parametrize("layout", ["fsdp 8", "fsdp 4 x tensor 2", "sequence 2 x fsdp 4"])
def test_every_mesh_gives_the_same_scores(layout):
    assert_equal(measured([packed_batch(1)], layout=LAYOUTS[layout]()), measured([packed_batch(1)]))


def test_padding_and_empty_rows_do_not_count():
    rows = packed_batch(1)
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 5)]), rows)
    empty = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), padded)
    other_tokens = dataclasses.replace(empty, tokens=jnp.where(empty.segment_ids == 0, 7, empty.tokens))
    for batch in ("l2", "mean", "variance"):
        assert_equal(measured([other_tokens], batch=batch), measured([rows], batch=batch))


def moments_of(rows, layout=None):
    """Of numbers for each row, on one device or split over a mesh."""
    rows = jnp.asarray(rows, jnp.float32)
    if layout is not None:
        rows = jax.device_put(rows, layout.sharding(("batch", None), rows.shape))
    return jax.jit(Moments.of)(rows, jnp.ones(len(rows), bool))


@pytest.mark.parametrize("layout", [None, "fsdp 8", "fsdp 4 x tensor 2"])
def test_a_small_variance_of_large_numbers_is_not_lost(layout):
    """Its share of a mean square is less than float32 resolves."""
    rng = np.random.default_rng(0)
    rows = np.asarray(rng.normal(300, 0.013, (64, 5)), np.float32)
    place = LAYOUTS[layout]() if layout else None
    adding, total = jax.jit(add), Moments(jnp.zeros(5), jnp.zeros(5), jnp.zeros(()))
    for part in np.split(rows, 8):
        total = adding(total, moments_of(part, place))
    at_once = moments_of(rows, place)
    for found in (total, at_once):
        np.testing.assert_allclose(found.squares / found.rows, rows.var(0, dtype=np.float64), rtol=1e-3)
        np.testing.assert_allclose(found.mean, rows.mean(0, dtype=np.float64), rtol=1e-6)


def test_a_small_variance_over_the_tokens_of_a_row_is_not_lost():
    rng = np.random.default_rng(0)
    heads = np.asarray(rng.normal(300, 0.013, (3, 16, 4, 4)), np.float32)
    tap = importance_taps(CONFIG, sequence="variance")["0"]
    values = {point: jnp.asarray(heads[..., 0]) for point in tap.points} | {"heads": jnp.asarray(heads)}
    found = tap.reduce(values, jnp.ones((3, 16)))["heads"]
    np.testing.assert_allclose(found.mean, heads.var(1, dtype=np.float64).mean(0), rtol=1e-3)


def test_no_activation_of_all_layers_exists():
    """What leaves the scan is one number per part: no array of layers x rows x length x neurons."""
    rows = packed_batch(1)
    taps = importance_taps(CONFIG)
    shapes = jax.eval_shape(lambda p: apply(CONFIG, p, rows, taps=taps).taps, tiny_params(CONFIG))
    assert {leaf.shape for leaf in jax.tree.leaves(shapes["0"])} == {(2, 32), (2, 4, 4), (2, 16), (2,)}
