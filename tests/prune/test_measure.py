"""Ways to score parts: slopes by finite differences, and layers by leaving them out for good."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_times
from tiny import LAYOUTS, family_models, lacking, llama, packed_batch, slow
from tiny import params as tiny_params

from jaxdistill.losses.scores import Scores
from jaxdistill.losses.terms import forward_kl
from jaxdistill.models.decoder import apply, scores
from jaxdistill.models.schema import param_shardings, unstack
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.depth import best_window, layers_when_dropped, without_layers
from jaxdistill.prune.measure import Activations, Calibration, MaskGradients, RandomScores, WeightMagnitude
from jaxdistill.prune.plan import depth_plan
from jaxdistill.prune.slice import prune_model
from jaxdistill.sharding import put_batch

THIN = llama(layers=1, mlp=20).layers[0]
CONFIG = dataclasses.replace(llama(layers=2), layers=(*llama(layers=2).layers, THIN))
BATCHES = [packed_batch(1), packed_batch(2)]


def calibration(layout="one device", batches=BATCHES, config=CONFIG):
    place = LAYOUTS[layout]()
    params = jax.device_put(tiny_params(config), param_shardings(config, place))
    rows = [put_batch(place, jax.tree.map(np.asarray, batch)) for batch in batches]
    return Calibration(config=config, params=params, batches=rows, layout=place)


def row_losses(gates):
    """Mean cross-entropy of each row of the first batch, from whole scores."""
    batch = BATCHES[0]
    outputs = apply(CONFIG, tiny_params(CONFIG), batch, gates=gates)
    log_probs = jax.nn.log_softmax(scores(outputs.hidden, outputs.head))
    losses = -jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    return (losses * batch.loss_mask).sum(1) / jnp.maximum(batch.loss_mask.sum(1), 1)


ROW_LOSSES = jax.jit(row_losses)


@functools.cache
def measured(scorer, layout="one device", batches=2):
    """What a scorer finds; asked for by several tests."""
    return scorer(calibration(layout, BATCHES[:batches]))


def one_gate(segment, point, size, parts, layer, part, factor):
    """1 everywhere but at one part of one layer."""
    gate = np.ones((size, 1, parts), np.float32)
    gate[layer, 0, part] = factor
    return {segment: {point: gate}}


@pytest.mark.parametrize(
    ("gate", "found"),
    [
        (("0", "mlp", 2, 32, 1, 5), lambda s: s.widths["mlp"][1][5]),
        (("1", "mlp", 1, 20, 0, 3), lambda s: s.widths["mlp"][2][3]),
        (("0", "heads", 2, 4, 0, 2), lambda s: s.widths["heads"][0][2]),
        (("1", "layer", 1, 1, 0, 0), lambda s: s.layers[2]),
    ],
)
def test_mask_gradients_are_slopes_of_the_rows_losses(gate, found):
    step = 1e-2
    slope = (ROW_LOSSES(one_gate(*gate, 1 + step)) - ROW_LOSSES(one_gate(*gate, 1 - step))) / (2 * step)
    np.testing.assert_allclose(found(measured(MaskGradients(), batches=1)), np.abs(np.asarray(slope)).mean(), rtol=2e-2)


def test_a_channels_factor_stands_in_all_layers_and_a_groups_at_its_heads():
    """Where all factors of a part move together, their slopes add before the absolute value is taken."""
    step, channel = 1e-2, 3

    def channel_gates(factor):
        gates = {}
        for segment, size in (("0", 2), ("1", 1)):
            gate = np.ones((size, 1, 16), np.float32)
            gate[:, :, channel] = factor
            gates[segment] = {"mixer_normed": gate, "ffn_normed": gate}
        return gates

    found = measured(MaskGradients(), batches=1)
    slope = (ROW_LOSSES(channel_gates(1 + step)) - ROW_LOSSES(channel_gates(1 - step))) / (2 * step)
    np.testing.assert_allclose(found.embed[channel], np.abs(np.asarray(slope)).mean(), rtol=2e-2)

    def group_gates(factor):
        gate = np.ones((2, 1, 4), np.float32)
        gate[1, :, 2:] = factor
        return {"0": {"heads": gate}}

    slope = (ROW_LOSSES(group_gates(1 + step)) - ROW_LOSSES(group_gates(1 - step))) / (2 * step)
    np.testing.assert_allclose(found.widths["kv_heads"][1][1], np.abs(np.asarray(slope)).mean(), rtol=2e-2)


@pytest.mark.parametrize("scorer", [Activations(), MaskGradients(), WeightMagnitude(), RandomScores(seed=3)])
def test_every_scorer_gives_the_same_on_a_mesh(scorer):
    one, mesh = measured(scorer), measured(scorer, "fsdp 4 x tensor 2")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), mesh, one)
    assert [len(scores) for scores in one.widths["mlp"]] == [32, 32, 20]
    assert (one.embed.shape, one.layers.shape) == ((16,), (3,))


@pytest.mark.parametrize("scorer", [Activations(), MaskGradients(), WeightMagnitude()])
@pytest.mark.parametrize("name", ["lacking", slow("gemma3"), slow("qwen3_moe")])
def test_every_scorer_scores_what_there_is(scorer, name):
    """Parts of halves that a layer lacks are none, and the rest can be cut."""
    config = lacking() if name == "lacking" else family_models()[name]
    batches = [packed_batch(1, vocab=config.vocab)]
    found = scorer(calibration(batches=batches, config=config))
    for axis, scores_ in found.widths.items():
        assert [len(each) for each in scores_] == [spec.parts.get(axis, 0) for spec in config.layers]
        assert all((each > 0).any() for each in scores_ if len(each))
    smaller, params = prune_model(config, tiny_params(config), choose(config, found, Target(embed=12, mlp=6)))
    assert {spec.widths["mlp"] for spec in smaller.layers if spec.ffn is not None} == {6}
    assert np.isfinite(apply(smaller, params, batches[0]).hidden).all()


def test_batches_of_mask_gradients_are_one_large_batch():
    together = jax.tree.map(lambda *x: jnp.concatenate(x), *BATCHES)
    one, two = MaskGradients()(calibration(batches=[together])), measured(MaskGradients())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), one, two)


def test_weight_magnitude_is_the_norm_of_all_weights_of_a_part():
    config = CONFIG
    flat = {name: np.asarray(w, np.float64) for name, w in unstack(config, tiny_params(config)).items()}
    found = WeightMagnitude()(calibration())
    neuron = np.concatenate(
        [
            flat["layers.2.ffn.gate.kernel"][:, 7],
            flat["layers.2.ffn.up.kernel"][:, 7],
            flat["layers.2.ffn.down.kernel"][7],
        ]
    )
    np.testing.assert_allclose(found.widths["mlp"][2][7], np.linalg.norm(neuron), rtol=1e-5)
    layer = np.concatenate([w.ravel() for name, w in flat.items() if name.startswith("layers.1.")])
    np.testing.assert_allclose(found.layers[1], np.linalg.norm(layer), rtol=1e-5)
    channel = [flat["embedding.kernel"][:, 4], flat["final_norm.scale"][4:5]]
    for name, w in flat.items():
        if name.startswith("layers."):
            channel.append((w[..., 4] if name.endswith(("output.kernel", "down.kernel", "scale")) else w[4]).ravel())
    np.testing.assert_allclose(found.embed[4], np.linalg.norm(np.concatenate(channel)), rtol=1e-5)


@functools.cache
def value_of_a_cut_model(by, kept):
    """The mean over all batches, from whole scores of a model that has only some of the layers."""
    smaller, cut = prune_model(CONFIG, tiny_params(CONFIG), depth_plan(CONFIG, kept))

    @jax.jit
    def values(batch):
        outputs = apply(smaller, cut, batch)
        own = scores(outputs.hidden, outputs.head).reshape(-1, 64)
        if by == "loss":
            targets = batch.targets.reshape(-1, 1)
            return -jnp.take_along_axis(jax.nn.log_softmax(own), targets, axis=-1)[:, 0]
        full = apply(CONFIG, tiny_params(CONFIG), batch)
        return forward_kl(Scores(scores(full.hidden, full.head).reshape(-1, 64)), Scores(own))

    total = sum(float((values(batch) * batch.loss_mask.reshape(-1)).sum()) for batch in BATCHES)
    return total / sum(float(batch.loss_mask.sum()) for batch in BATCHES)


@pytest.mark.parametrize("by", ["loss", "kl"])
@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
def test_a_layer_that_is_left_out_is_gone(by, layout):
    """The same numbers as from models that were cut."""
    found = without_layers(calibration(layout), [(0,), (2,), (1, 2)], by=by)
    expected = [value_of_a_cut_model(by, kept) for kept in ((1, 2), (0, 1), (0,))]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_scores_of_layers_and_the_best_block():
    given = calibration(config=llama(layers=4))
    alone = layers_when_dropped(given)
    np.testing.assert_allclose(alone, without_layers(given, [(0,), (1,), (2,), (3,)]), rtol=1e-6)
    blocks = without_layers(given, [(0, 1), (1, 2), (2, 3)], by="kl")
    first = int(np.argmin(blocks))
    assert best_window(given, 2, by="kl") == tuple(i for i in range(4) if i not in (first, first + 1))
    with pytest.raises(ValueError, match="cannot keep 4 layers of 4 by dropping a block; choose from 1 to 3"):
        best_window(given, 4)


@pytest.mark.parametrize("scorer", [Activations(), slow(MaskGradients())])
def test_sums_lie_whole_on_every_device_and_one_program_adds_all_batches(scorer, monkeypatch, caplog):
    """Processes read them; placed otherwise than the zeros at the start they would need a program of their own."""
    whole: list[bool] = []
    wait = jax.block_until_ready

    def look(sums):
        whole.extend(leaf.is_fully_replicated for leaf in jax.tree.leaves(sums))
        return wait(sums)

    given = calibration("fsdp 4 x tensor 2")
    monkeypatch.setattr(jax, "block_until_ready", look)
    with compiled_times(caplog) as count:
        scorer(given)
    assert whole
    assert all(whole)
    assert count("accumulate") == 1


LONG = llama(layers=5, mlp=37)


@pytest.mark.parametrize(
    "measure",
    [
        Activations(),
        Activations(sequence="variance", batch="variance"),
        MaskGradients(),
        layers_when_dropped,
        functools.partial(layers_when_dropped, by="kl"),
        functools.partial(best_window, keep=3),
    ],
)
def test_no_activation_of_all_layers_is_kept(measure, monkeypatch):
    """Nothing that is as large as the neurons of all layers, forward or backward."""
    sizes: list[int] = []

    def traced(self, measure):
        program = str(jax.make_jaxpr(measure)(self.params, self.batches[0]))
        sizes.extend(
            int(np.prod([int(n) for n in shape.split(",") if n])) for shape in re.findall(r"\w\d+\[([\d,]*)\]", program)
        )
        shapes = jax.eval_shape(measure, self.params, self.batches[0])
        return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)

    monkeypatch.setattr(Calibration, "total", traced)
    measure(calibration(config=LONG))
    assert max(sizes) < len(LONG.layers) * BATCHES[0].tokens.size * 37


def test_nothing_to_measure_on_is_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        calibration(batches=[])


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"2": {}}, "segment '2'"),
        ({"0": {"query": np.ones((2, 1, 4))}}, "allowed are the segments"),
        ({"0": {"mlp": np.ones((3, 1, 32))}}, "layers of the segment"),
    ],
)
def test_gates_that_fit_nothing_are_refused(gates, message):
    with pytest.raises(ValueError, match=message):
        apply(CONFIG, tiny_params(CONFIG), BATCHES[0], gates=gates)
