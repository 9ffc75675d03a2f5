"""Pruning mixtures: experts, and neurons inside each of them; beside layers that have no experts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import llama, mixture, packed_batch, slow
from tiny import params as tiny_params

from jaxdistill.losses.scores import Scores
from jaxdistill.losses.terms import forward_kl
from jaxdistill.models.decoder import apply, scores
from jaxdistill.models.schema import param_shardings, stack, unstack
from jaxdistill.prune.baselines import even_importance, random_importance
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.importance import Importance
from jaxdistill.prune.measure import Activations, Calibration, MaskGradients, WeightMagnitude
from jaxdistill.prune.plan import PrunePlan, whole_plan
from jaxdistill.prune.slice import prune_model
from jaxdistill.sharding import Layout, MeshConfig, make_mesh, put_batch

DENSE = llama(layers=1, mlp=20).layers[0]
CONFIG = dataclasses.replace(mixture(), layers=(*mixture().layers, DENSE))
"""Two layers with 8 experts of 12 neurons, then one with a single network of 20."""
LAYOUTS = {
    "one device": Layout,
    "expert 2 x fsdp 2 x tensor 2": lambda: Layout(make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2))),
}
BATCH = packed_batch(1)


def hidden(config, params):
    return np.asarray(jax.jit(lambda p: apply(config, p, BATCH).hidden)(params))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeping_everything_changes_no_bit_and_an_order_no_score(layout):
    place, params = LAYOUTS[layout](), tiny_params(CONFIG)
    placed = jax.device_put(params, param_shardings(CONFIG, place))
    same, kept = prune_model(CONFIG, placed, whole_plan(CONFIG), layout=place)
    assert same == CONFIG
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    plan = choose(CONFIG, random_importance(CONFIG, 3), Target(), sort=True)
    assert plan.widths["experts"][0] != tuple(range(8))
    _, permuted = prune_model(CONFIG, placed, plan, layout=place)
    before, after = (apply(CONFIG, p, BATCH) for p in (params, jax.device_get(permuted)))
    np.testing.assert_allclose(
        scores(after.hidden, after.head), scores(before.hidden, before.head), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_cut_is_what_was_masked(layout):
    """Dropped experts are barred from the router, dropped neurons read as 0."""
    place, target = LAYOUTS[layout](), Target(experts=4, mlp=6)
    parameters = reference.random_parameters(CONFIG)
    plan = choose(CONFIG, random_importance(CONFIG, 5), target)
    placed = jax.device_put(stack(CONFIG, parameters), param_shardings(CONFIG, place))
    smaller, cut = prune_model(CONFIG, placed, plan, layout=place)
    assert [layer.widths.get("experts") for layer in smaller.layers] == [4, 4, None]
    assert [layer.ffn.mlp for layer in smaller.layers] == [6, 6, 6]
    masked = dict(parameters)
    for layer in range(3):
        name = f"layers.{layer}.ffn.down.kernel"
        kept = np.zeros(CONFIG.layers[layer].parts["mlp"])
        kept[list(plan.widths["mlp"][layer])] = 1
        masked[name] = parameters[name] * kept.reshape(parameters[name].shape[:-1])[..., None]
        if layer < 2:
            barred = np.full(8, -np.inf)
            barred[list(plan.widths["experts"][layer])] = 0
            masked[f"layers.{layer}.barred"] = barred
    expected = reference.hidden(CONFIG, masked, *map(np.asarray, (BATCH.tokens, BATCH.positions, BATCH.segment_ids)))
    seen = np.asarray(BATCH.segment_ids) > 0
    np.testing.assert_allclose(hidden(smaller, jax.device_get(cut))[seen], expected[seen], rtol=1e-3, atol=1e-4)
    assert cut["segments"]["0"]["ffn"]["gate"]["kernel"].sharding.is_equivalent_to(
        param_shardings(smaller, place)["segments"]["0"]["ffn"]["gate"]["kernel"], 4
    )


def calibration(layout: Layout = Layout()) -> Calibration:
    params = jax.device_put(stack(CONFIG, reference.random_parameters(CONFIG)), param_shardings(CONFIG, layout))
    return Calibration(
        config=CONFIG, params=params, batches=[put_batch(layout, jax.tree.map(np.asarray, BATCH))], layout=layout
    )


@pytest.mark.parametrize(("sequence", "batch"), [("mean", "l2"), ("l2", "mean"), ("variance", "variance")])
def test_scores_are_those_of_the_definition(sequence, batch):
    """Expert: the mean norm of its part of the stream over the tokens that chose it. Its neurons: over these tokens."""
    points: list[dict] = []
    given = map(np.asarray, (BATCH.tokens, BATCH.positions, BATCH.segment_ids))
    reference.hidden(CONFIG, reference.random_parameters(CONFIG), *given, points=points)
    found = Activations(sequence=sequence, batch=batch)(calibration())
    real = np.asarray(BATCH.segment_ids) > 0
    of_tokens = {"mean": lambda x: np.abs(x).mean(0), "l2": lambda x: np.sqrt((x**2).sum(0)), "variance": np.var}
    of_rows = {"mean": np.mean, "l2": lambda x, axis: np.sqrt(np.square(x).sum(axis)), "variance": np.var}
    for layer in range(2):
        chosen = points[layer]["chosen_experts"]
        for expert in range(8):
            rows, norms = [], []
            for row in range(8):
                places = np.argwhere((chosen[row] == expert) & real[row][:, None])
                norms += [np.linalg.norm(points[layer]["experts"][row][tuple(place)]) for place in places]
                if len(places):
                    values = np.stack([points[layer]["mlp"][row][tuple(place)] for place in places])
                    reduce = of_tokens[sequence]
                    rows.append(reduce(values, 0) if sequence == "variance" else reduce(values))
            expected = of_rows[batch](np.stack(rows), axis=0)
            mlp = found.widths["mlp"][layer][expert * 12 : expert * 12 + 12]
            np.testing.assert_allclose(mlp, expected, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(found.widths["experts"][layer][expert], np.mean(norms), rtol=1e-3)
    assert len(found.widths["experts"][2]) == 0


@pytest.mark.parametrize("scorer", [Activations(), slow(MaskGradients()), WeightMagnitude()])
def test_every_scorer_gives_the_same_on_a_mesh(scorer):
    one, mesh = scorer(calibration()), scorer(calibration(LAYOUTS["expert 2 x fsdp 2 x tensor 2"]()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), mesh, one)
    assert [len(each) for each in one.widths["experts"]] == [8, 8, 0]
    assert [len(each) for each in one.widths["mlp"]] == [96, 96, 20]


def test_mask_gradients_are_slopes_of_the_rows_losses():
    parameters = stack(CONFIG, reference.random_parameters(CONFIG))
    measured, step = MaskGradients()(calibration()), 1e-2

    @jax.jit
    def losses(gates):
        outputs = apply(CONFIG, parameters, BATCH, gates={"0": gates})
        log_probs = jax.nn.log_softmax(scores(outputs.hidden, outputs.head))
        each = -jnp.take_along_axis(log_probs, BATCH.targets[..., None], axis=-1)[..., 0]
        return (each * BATCH.loss_mask).sum(1) / jnp.maximum(BATCH.loss_mask.sum(1), 1)

    for axis, parts, part in (("experts", 8, 5), ("mlp", 96, 40)):
        up, down = np.ones((2, 2, 1, parts), np.float32)
        up[1, 0, part], down[1, 0, part] = 1 + step, 1 - step
        slope = np.asarray(losses({axis: up}) - losses({axis: down})) / (2 * step)
        np.testing.assert_allclose(measured.widths[axis][1][part], np.abs(slope).mean(), rtol=5e-2, atol=2e-5)


def test_weight_magnitude_is_the_norm_of_all_weights_of_a_part():
    parameters = reference.random_parameters(CONFIG)
    found = WeightMagnitude()(calibration())
    gate, up, down, router = (parameters[f"layers.1.ffn.{name}.kernel"] for name in ("gate", "up", "down", "router"))
    expert = np.concatenate([gate[3].ravel(), up[3].ravel(), down[3].ravel(), router[:, 3]])
    np.testing.assert_allclose(found.widths["experts"][1][3], np.linalg.norm(expert), rtol=1e-5)
    neuron = np.concatenate([gate[3][:, 7], up[3][:, 7], down[3][7]])
    np.testing.assert_allclose(found.widths["mlp"][1][3 * 12 + 7], np.linalg.norm(neuron), rtol=1e-5)


def test_the_best_experts_stay_and_of_each_its_best_neurons(tmp_path):
    importance = random_importance(CONFIG, 1)
    plan = choose(CONFIG, importance, Target(experts=3, mlp=4))
    best = np.sort(np.argsort(-importance.widths["experts"][0])[:3])
    assert plan.widths["experts"][0] == tuple(best)
    for at, expert in enumerate(best):
        own = importance.widths["mlp"][0][expert * 12 : expert * 12 + 12]
        expected = tuple(int(expert * 12 + i) for i in np.sort(np.argsort(-own)[:4]))
        assert plan.widths["mlp"][0][at * 4 : at * 4 + 4] == expected
    assert plan.widths["experts"][2] == ()
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    importance.save(tmp_path / "importance.npz")
    jax.tree.map(np.testing.assert_array_equal, Importance.load(tmp_path / "importance.npz"), importance)
    assert plan.summary() == "experts 3, mlp 4"
    even = choose(CONFIG, even_importance(CONFIG, Target(experts=2, mlp=2)), Target(experts=2, mlp=2))
    assert (even.widths["experts"][0], even.widths["mlp"][0]) == ((0, 7), (0, 11, 84, 95))


def test_a_mixture_cut_in_every_axis_runs():
    target = Target(layers=2, embed=10, mlp=5, heads=2, experts=3)
    plan = choose(CONFIG, random_importance(CONFIG, 2), target)
    smaller, cut = prune_model(CONFIG, tiny_params(CONFIG), plan)
    old, new = unstack(CONFIG, tiny_params(CONFIG)), unstack(smaller, cut)
    at = next(i for i, layer in enumerate(plan.layers) if layer < 2)
    kernel = np.asarray(old[f"layers.{plan.layers[at]}.ffn.up.kernel"])
    for place, expert in enumerate(plan.widths["experts"][at]):
        neurons = [i % 12 for i in plan.widths["mlp"][at][place * 5 : place * 5 + 5]]
        expected = kernel[expert][list(plan.embed)][:, neurons]
        np.testing.assert_array_equal(new[f"layers.{at}.ffn.up.kernel"][place], expected)
    outputs = apply(smaller, cut, BATCH)
    logits = Scores(scores(outputs.hidden, outputs.head).reshape(-1, 64))
    np.testing.assert_allclose(forward_kl(logits, logits), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(experts=1), "1 experts are to be kept in layer 0, each of whose tokens chooses 2; keep 2 or more"),
        (Target(experts=9), "experts of layer 0: 9 of 8 are to be kept"),
        (Target(mlp=13), "mlp of layer 0, expert 0: 13 of 12 are to be kept"),
    ],
)
def test_sizes_that_cannot_be_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        target.resize(CONFIG)


def test_experts_of_a_model_that_has_none_are_refused():
    with pytest.raises(ValueError, match="4 experts are to be kept, and the model has no mixture"):
        Target(experts=4).resize(llama())
    with pytest.raises(ValueError, match="the model has no mixture"):
        choose(llama(), random_importance(llama(), 0), Target(experts=4))


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("experts", "which mlp are kept and not which experts; give both"),
        ("kv_heads", "which heads .* not which kv_heads"),
    ],
)
def test_a_plan_with_members_and_no_groups_is_refused(dropped, message):
    document = choose(CONFIG, random_importance(CONFIG, 0), Target(mlp=6, heads=2)).to_dict()
    del document["widths"][dropped]
    with pytest.raises(ValueError, match=message):
        PrunePlan.from_dict(document)


def test_the_shape_of_a_target_is_that_of_its_plan():
    every_axis = Target(layers=(0, 2), embed=10, mlp=(5, 6), heads=2, experts=3)
    for target in (Target(), every_axis, Target(layers=(1, 2), mlp=4)):
        assert target.resize(CONFIG) == choose(CONFIG, random_importance(CONFIG, 0), target).resize(CONFIG)


def test_neurons_of_another_expert_are_refused():
    plan = whole_plan(CONFIG)
    neurons = tuple(range(95, -1, -1))
    with pytest.raises(ValueError, match=r"number i of the mlp belongs to number i // 12 of the experts"):
        dataclasses.replace(plan, widths={**plan.widths, "mlp": (neurons, *plan.widths["mlp"][1:])})


def test_experts_that_the_mesh_does_not_divide_are_refused():
    place = LAYOUTS["expert 2 x fsdp 2 x tensor 2"]()
    plan = choose(CONFIG, random_importance(CONFIG, 0), Target(experts=5))
    with pytest.raises(ValueError, match="experts would be 5, which the 2 devices that split it do not divide"):
        prune_model(CONFIG, tiny_params(CONFIG), plan, layout=place)
