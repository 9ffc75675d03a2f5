"""Tiny models, batches and meshes that many tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.load import model_config
from jaxdistill.models.schema import schema, stack
from jaxdistill.sharding import DEFAULT_RULES, Layout, MeshConfig, make_mesh
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, MixtureOfExperts, ModelConfig
from jaxdistill.types import Batch, PairedBatch, Params

LAYOUTS = {
    "one device": Layout,
    "fsdp 8": lambda: Layout(make_mesh(MeshConfig(fsdp=8))),
    "fsdp 4 x tensor 2": lambda: Layout(make_mesh(MeshConfig(fsdp=4, tensor=2))),
    "data 2 x fsdp 2 x tensor 2": lambda: Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))),
    "sequence 2 x fsdp 4": lambda: Layout(make_mesh(MeshConfig(sequence=2, fsdp=4))),
    "embed over tensor": lambda: Layout(
        make_mesh(MeshConfig(fsdp=2, tensor=4)), DEFAULT_RULES.replace(vocab=None, embed=("fsdp", "tensor"))
    ),
}
"""Every way of placing a model that a result must not depend on."""


def slow(*values) -> Any:
    """A case of a parametrised test that `make test-slow` runs: one like it is in `make test`."""
    return pytest.param(*values, marks=pytest.mark.slow)


MESHES = [name if name in ("one device", "fsdp 4 x tensor 2") else slow(name) for name in LAYOUTS]
"""Cases of tests on every layout: of the meshes, `make test` tries the one that splits most."""

MODEL_MESHES = [case for name, case in zip(LAYOUTS, MESHES, strict=True) if name != "embed over tensor"]
"""The same for whole models: where heads and channels are split alike only a head fits."""


def llama(
    *, vocab: int = 64, embed: int = 16, layers: int = 2, heads: int = 4, kv_heads: int = 2, mlp: int = 32, tied=True
) -> ModelConfig:
    layer = LayerSpec(mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=4), ffn=GatedMLP(mlp=mlp))
    return ModelConfig(family="llama", vocab=vocab, embed=embed, layers=(layer,) * layers, tied=tied)


def family_models() -> dict[str, ModelConfig]:
    """A tiny model of every family, as the committed checkpoints have them."""
    return {folder.name: model_config(folder) for folder in sorted(TINY_MODELS.iterdir())}


def lacking() -> ModelConfig:
    """A model of whose layers one has no attention, one no feed-forward, and one neither; widths differ."""
    whole = llama(layers=1).layers[0]
    thin = llama(layers=1, heads=2, kv_heads=1, mlp=12).layers[0]
    layers = (
        dataclasses.replace(whole, mixer=None),
        whole,
        dataclasses.replace(thin, ffn=None),
        dataclasses.replace(whole, mixer=None, ffn=None),
        thin,
    )
    return dataclasses.replace(llama(tied=False), layers=layers)


TINY_MODELS = Path(__file__).parent / "golden" / "tiny_models"
FEW = ("gemma3", "olmo2")
"""Of these models the ones that `make test` tries where `make test-slow` tries all: together they have most of what a
family may have."""
FAMILY_CASES = [name if name in FEW else slow(name) for name in family_models()]


def mixture(*, vocab: int = 64, embed: int = 16, layers: int = 2, experts: int = 8, mlp: int = 12) -> ModelConfig:
    """A decoder whose tokens choose two of several experts in every layer."""
    ffn = MixtureOfExperts(experts=experts, experts_per_token=2, mlp=mlp)
    layer = LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=4), ffn=ffn)
    return ModelConfig(family="mixtral", vocab=vocab, embed=embed, layers=(layer,) * layers, tied=False)


def params(config: ModelConfig, seed: int = 0, *, head_scale: float = 1.0) -> Params:
    """Random parameters from NumPy, in the stacked form: `init_params` would spend seconds compiling its generator."""
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("scale"):
            return (rng.uniform(0.5, 1.5, shape) - config.norm.one_plus).astype(np.float32)
        scale = head_scale if name.startswith("head") else 1.0
        return (scale * rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    return stack(config, {name: jnp.asarray(values(name, spec.shape)) for name, spec in schema(config).items()})


def packed_batch(seed: int = 0, *, rows: int = 8, length: int = 16, vocab: int = 64) -> Batch:
    """Rows of two or three documents of random lengths and some padding; row 0 has few supervised targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1))
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    mask = np.zeros((rows, length), np.float32)
    for row in range(rows):
        ends = np.sort(rng.choice(np.arange(2, length - 1), size=2, replace=False))
        for segment, (start, stop) in enumerate(zip([0, ends[0]], ends, strict=True), 1):
            segments[row, start:stop] = segment
            positions[row, start:stop] = np.arange(stop - start)
            mask[row, start : stop - 1] = 1.0
    mask[0, 2:] = 0.0
    return Batch(
        tokens=jnp.asarray(tokens[:, :-1], jnp.int32),
        targets=jnp.asarray(tokens[:, 1:], jnp.int32),
        loss_mask=jnp.asarray(mask),
        positions=jnp.asarray(positions),
        segment_ids=jnp.asarray(segments),
        target_bytes=jnp.ones((rows, length), jnp.int32),
    )


def random_alignment(seed: int, *, rows: int = 3, length: int = 24, teacher_length: int = 20) -> dict[str, np.ndarray]:
    """chunks and segment ids of both sides, as the data gives them: some chunks are not supervised, and some segments
    have one more position, which only reads the last token."""
    rng = np.random.default_rng(seed)
    names = ("chunks", "segment_ids", "teacher_chunks", "teacher_segment_ids")
    found = {name: np.zeros((rows, teacher_length if "teacher" in name else length), np.int32) for name in names}
    for row in range(rows):
        at, number, segment = [0, 0], 0, 0
        while True:
            segment += 1
            sizes = rng.integers(1, 4, (int(rng.integers(1, 6)), 2))
            more = int(rng.integers(0, 2))
            needed = sizes.sum(0) + more
            if at[0] + needed[0] > length or at[1] + needed[1] > teacher_length:
                break
            ends = [at[0] + needed[0], at[1] + needed[1]]
            found["segment_ids"][row, at[0] : ends[0]] = segment
            found["teacher_segment_ids"][row, at[1] : ends[1]] = segment
            for own, theirs in sizes:
                if rng.uniform() < 0.85:
                    number += 1
                    found["chunks"][row, at[0] : at[0] + own] = number
                    found["teacher_chunks"][row, at[1] : at[1] + theirs] = number
                at = [at[0] + own, at[1] + theirs]
            at = ends
    return found


def paired_batch(
    seed: int = 0,
    *,
    rows: int = 8,
    length: int = 24,
    teacher_length: int = 20,
    vocab: int = 64,
    teacher_vocab: int = 64,
) -> PairedBatch:
    """Random tokens under a random alignment; most of a segment's targets are supervised, in chunks or not."""
    found = random_alignment(seed, rows=rows, length=length, teacher_length=teacher_length)
    rng = np.random.default_rng(seed + 500)

    def side(segments: np.ndarray, ids: int) -> Batch:
        tokens = rng.integers(0, ids, (rows, segments.shape[1] + 1))
        starts = np.concatenate([np.ones((rows, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
        counted = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
        return Batch(
            tokens=jnp.asarray(tokens[:, :-1], jnp.int32),
            targets=jnp.asarray(tokens[:, 1:], jnp.int32),
            loss_mask=jnp.asarray((segments > 0) & (rng.uniform(size=segments.shape) < 0.8), jnp.float32),
            positions=jnp.asarray(counted - np.maximum.accumulate(np.where(starts, counted, 0), axis=1), jnp.int32),
            segment_ids=jnp.asarray(segments),
            target_bytes=jnp.ones(segments.shape, jnp.int32),
        )

    own = side(found["segment_ids"], vocab)
    return PairedBatch(
        **vars(own),
        chunks=jnp.asarray(found["chunks"]),
        teacher=side(found["teacher_segment_ids"], teacher_vocab),
        teacher_chunks=jnp.asarray(found["teacher_chunks"]),
    )


def assert_gradients_close(given, expected, *, rtol: float = 1e-5) -> None:
    """The house's tolerance for gradients: rtol 1e-5, atol a tenth of that of the leaf's largest entry."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            rtol=rtol,
            atol=rtol / 10 * float(jnp.abs(b).max()) + 1e-12,
        ),
        given,
        expected,
    )


def assert_changes_close(given, expected) -> None:
    """As above for what a step of SGD changed: differences of parameters carry their rounding, 1e-7 of their size."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=4e-7), given, expected)
