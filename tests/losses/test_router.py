"""Losses on routers: their definitions, and that they do not depend on how a batch is run."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import LAYOUTS, assert_changes_close, mixture, packed_batch, slow
from tiny import params as tiny_params

from jaxdistill.losses.hidden import hidden_taps
from jaxdistill.losses.router import RouterBalance, RouterZ
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.models.decoder import apply
from jaxdistill.models.schema import param_shardings
from jaxdistill.optimizer import Optax
from jaxdistill.sharding import put_batch
from jaxdistill.specs import GatedMLP
from jaxdistill.step import init_state, make_eval_step, make_train_step
from jaxdistill.train.config import TrainConfig
from jaxdistill.types import Tap

PLAIN = dataclasses.replace(mixture(layers=1).layers[0], ffn=GatedMLP(mlp=12))
CONFIG = dataclasses.replace(mixture(layers=3), layers=(mixture().layers[0], PLAIN, mixture().layers[0]))
MIXTURES = (0, 2)
TERMS = {
    "balance": RouterBalance(weight=0.5).resolved(MIXTURES),
    "z": RouterZ(weight=0.1).resolved(MIXTURES),
    "cross_entropy": CrossEntropy(),
}


def router_scores(params, batch) -> np.ndarray:
    """[layer, token, experts] of tokens that are not padding, in float64."""
    tap = Tap(points=("router",), reduce=lambda values, mask: values["router"], layers=MIXTURES)
    found = np.asarray(apply(CONFIG, params, batch, taps={"scores": tap}).taps["scores"], np.float64)
    return found[:, np.asarray(batch.segment_ids) > 0]


def balance64(scores: np.ndarray, choices: int) -> float:
    """Expert by expert."""
    flat = scores.reshape(-1, scores.shape[-1])
    probs = np.exp(flat) / np.exp(flat).sum(-1, keepdims=True)
    chosen = np.argsort(-flat, axis=-1)[:, :choices]
    shares = [(chosen == expert).sum() / len(flat) for expert in range(flat.shape[-1])]
    return flat.shape[-1] * sum(share * probs[:, expert].mean() for expert, share in enumerate(shares))


def test_values_are_those_of_the_definitions():
    params, batch = tiny_params(CONFIG), packed_batch(3)
    step = make_eval_step(functools.partial(apply, CONFIG, taps=hidden_taps(TERMS, "student")), None, TERMS, chunk=32)
    found = jax.jit(step)(params, None, batch)
    scores = router_scores(params, batch)
    np.testing.assert_allclose(found["balance"].value, balance64(scores, 2), rtol=1e-5)
    sizes = np.log(np.exp(scores).sum(-1))
    np.testing.assert_allclose(found["z"].value, (sizes**2).mean(), rtol=1e-5)


def test_equal_use_of_all_experts_is_least():
    """As large as the number of experts that a token chooses, which is what transformers has there."""
    even = {"probs": jnp.full((2, 8), 3.0), "chosen": jnp.full((2, 8), 6.0), "tokens": jnp.full(2, 24.0)}
    term = RouterBalance(layers=MIXTURES)
    mean = term(even)
    assert float((term.share(mean) * mean.total).sum()) == pytest.approx(2.0)


def changes(layout: str, accumulate: int):
    """By how much a step of SGD changes all parameters, and its metrics."""
    place, optimizer = LAYOUTS[layout](), Optax(optax.sgd(0.5)).build(10)
    student = jax.device_put(tiny_params(CONFIG), param_shardings(CONFIG, place))
    state = init_state(student, TERMS, optimizer, key=jax.random.key(0), student_embed=16, teacher_embed=16)
    before = jax.tree.map(np.asarray, state.params)
    step = make_train_step(
        functools.partial(apply, CONFIG, layout=place, taps=hidden_taps(TERMS, "student")),
        None,
        TERMS,
        optimizer,
        chunk=32,
        accumulate=accumulate,
        layout=place,
    )
    batch = put_batch(place, jax.tree.map(np.asarray, packed_batch(3)))
    after, metrics = jax.jit(step)(state, {}, None, batch)
    return jax.tree.map(lambda old, new: old - np.asarray(new), before, after.params), metrics


@pytest.mark.parametrize(
    ("layout", "accumulate"), [slow("one device", 4), ("fsdp 4 x tensor 2", 1), slow("fsdp 4 x tensor 2", 2)]
)
def test_neither_meshes_nor_micro_batches_change_a_step(layout, accumulate):
    expected, metrics = changes("one device", 1)
    given, others = changes(layout, accumulate)
    assert_changes_close(given, expected)
    for name in TERMS:
        np.testing.assert_allclose(others["terms"][name].value, metrics["terms"][name].value, rtol=1e-5)
    router = expected["student"]["segments"]["0"]["ffn"]["router"]["kernel"]
    assert np.abs(router).max() > 1e-4


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="RouterZ is a loss of routers, and the student has none"):
        RouterZ().resolved(())
    with pytest.raises(ValueError, match="call `resolved` first"):
        hidden_taps({"balance": RouterBalance()}, "student")
    with pytest.raises(ValueError, match=r"\['balance'\] are on routers"):
        TrainConfig(out="x", losses={"balance": RouterBalance()}, weighting="gradient_magnitude")
