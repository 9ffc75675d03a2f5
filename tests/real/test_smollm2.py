"""The default teacher, read from its GGUF file, says what it is known to say."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.assets import ASSETS, cache_directory
from jaxdistill.generate import generate
from jaxdistill.models.decoder import Rows, apply, scores
from jaxdistill.models.load import read_model
from jaxdistill.models.schema import count_parameters
from jaxdistill.tokenizers.load import load_tokenizer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def path() -> Path:
    path = cache_directory() / "smollm2" / ASSETS["smollm2"].files[0].name
    assert path.is_file(), f"{path} is missing; run `python tools/fetch_assets.py smollm2`."
    return path


@pytest.fixture(scope="module")
def model(path):
    return read_model(path)


def test_size(model):
    config, params = model
    assert count_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    assert (len(config.layers), config.embed, config.vocab, config.tied) == (30, 576, 49152, True)
    assert (config.max_length, config.norm_epsilon) == (8192, 1e-5)
    mixer = config.layers[0].mixer
    assert (mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.rope.theta) == (9, 3, 64, 1e5)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("prompt", "next_token", "probability"),
    [("The capital of France is", " Paris", 0.77), ("Water boils at 100 degrees", " Celsius", 0.915)],
)
def test_known_facts(model, path, prompt, next_token, probability):
    config, params = model
    tokenizer = load_tokenizer(path)
    tokens = np.asarray(tokenizer.encode(prompt).ids)[None]
    rows = Rows(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
    outputs = jax.jit(lambda p: apply(config, p, rows))(params)
    probabilities = jax.nn.softmax(scores(outputs.hidden[0, -1], outputs.head))
    assert tokenizer.decode([int(probabilities.argmax())]) == next_token
    np.testing.assert_allclose(probabilities.max(), probability, atol=0.01)
    (continuation,) = generate(config, params, [tokens[0].tolist()], max_new_tokens=1, temperature=0.0)
    assert tokenizer.decode(continuation) == next_token
