"""Block Influence by its definition, token by token, and the choice of layers by hand."""

from __future__ import annotations

import jax
import numpy as np
from tiny import llama, packed_batch

from jaxdistill.models.decoder import apply
from jaxdistill.models.schema import init_params
from jaxdistill.prune.block_influence import block_influence_tap
from jaxdistill.types import Tap

CONFIG = llama(layers=3)


def test_influence_is_the_mean_over_tokens_that_are_not_padding():
    batch = packed_batch(0, rows=3)
    real = np.asarray(batch.segment_ids) > 0
    assert not real.all()
    stream = Tap(points=("input", "output"), reduce=lambda values, mask: dict(values))
    taps = {"influence": block_influence_tap(), "stream": stream}
    seen = jax.jit(lambda p: apply(CONFIG, p, batch, taps=taps).taps)(init_params(CONFIG, jax.random.key(0)))
    expected = []
    inputs, outputs = (np.asarray(seen["stream"][point], np.float64) for point in ("input", "output"))
    for before, after in zip(inputs, outputs, strict=True):
        cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(before[real], after[real], strict=True)]
        expected.append(1 - np.mean(cosines))
    np.testing.assert_array_equal(seen["influence"].count, real.sum())
    np.testing.assert_allclose(seen["influence"].value, expected, rtol=1e-4)


def test_padding_cannot_poison_it():
    values = {"input": np.array([[[1.0, 0.0], [np.nan, 1.0]]]), "output": np.array([[[0.0, 2.0], [np.inf, 1.0]]])}
    found = block_influence_tap().reduce(values, np.array([[1.0, 0.0]]))
    assert (float(found.total), float(found.count)) == (1.0, 1.0)  # a right angle
