"""Layers that differ, made alike: same outputs, and formats for equal layers can hold them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny import LAYOUTS, family_models, lacking, llama, mixture, packed_batch, slow
from tiny import params as tiny_params

from jaxdistill.models.decoder import apply
from jaxdistill.models.export import check_exportable, write_hf
from jaxdistill.models.families.family import ConfigError
from jaxdistill.models.load import read_model
from jaxdistill.models.padding import pad_layers
from jaxdistill.models.schema import param_shardings
from jaxdistill.specs import Norm


def hidden(config, params):
    return np.asarray(jax.jit(lambda p: apply(config, p, packed_batch(0, vocab=config.vocab)).hidden)(params))


def wider_heads():
    """Layers of 2 and 4 key-value heads, with 3 and 2 query heads each."""
    one, other = llama(layers=1, heads=6, kv_heads=2).layers[0], llama(layers=1, heads=8, kv_heads=4, mlp=20).layers[0]
    biases = {"bias": True, "output_bias": True}
    layers = [dataclasses.replace(x, mixer=dataclasses.replace(x.mixer, **biases)) for x in (one, other)]
    return dataclasses.replace(llama(tied=False), layers=tuple(layers))


def experts():
    one, other = mixture(layers=1).layers[0], mixture(layers=1, mlp=20).layers[0]
    return dataclasses.replace(mixture(), layers=(one, dataclasses.replace(other, mixer=None), other))


def sandwich():
    """Norms of what is added, of 1 + w, and layers that lack halves."""
    layers = [dataclasses.replace(spec, norms="both") for spec in lacking().layers]
    return dataclasses.replace(lacking(), layers=tuple(layers), norm=Norm(one_plus=True))


MODELS = {"lacking": lacking, "wider heads": wider_heads, "experts": experts, "both norms": sandwich}


@pytest.mark.parametrize("layout", ["one device", slow("fsdp 4 x tensor 2")])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_the_same(name, layout):
    config, place = MODELS[name](), LAYOUTS[layout]()
    params = tiny_params(config)
    wider, padded = pad_layers(config, jax.device_put(params, param_shardings(config, place)), layout=place)
    assert wider.homogeneous
    np.testing.assert_allclose(hidden(wider, padded), hidden(config, params), atol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, padded) == param_shardings(wider, place)


def test_a_padded_model_is_written_and_read(tmp_path):
    config = lacking()
    params = tiny_params(config)
    with pytest.raises(ConfigError, match=r"the layers \[0, 2, 3\] lack attention or feed-forward.*--pad"):
        check_exportable(config)
    wider, padded = pad_layers(config, params)
    write_hf(tmp_path / "out", wider, padded, dtype="float32")
    again, read = read_model(tmp_path / "out")
    assert again == wider
    np.testing.assert_allclose(hidden(again, read), hidden(config, params), atol=1e-5)


def test_equal_layers_stay_as_they_are():
    config = family_models()["gemma3"]
    params = tiny_params(config)
    wider, padded = pad_layers(config, params)
    assert wider == config
    jax.tree.map(np.testing.assert_array_equal, padded, params)


def test_what_zeros_would_change_is_refused():
    def two(**changes):
        """A layer, and a narrower one with these changes of its attention."""
        one, other = llama(layers=1).layers[0], llama(layers=1, heads=2, kv_heads=1).layers[0]
        layers = (one, dataclasses.replace(other, mixer=dataclasses.replace(other.mixer, **changes)))
        return dataclasses.replace(llama(), layers=layers)

    together = [dataclasses.replace(x, mixer=dataclasses.replace(x.mixer, qk_norm="all")) for x in two().layers]
    numbers = (mixture(layers=1).layers[0], mixture(layers=1, experts=4).layers[0])
    for config, message in (
        (two(head_dim=8), "differs in"),
        (two(bias=True), "differs in"),
        (dataclasses.replace(llama(), layers=tuple(together)), "all heads of .* together"),
        (dataclasses.replace(mixture(), layers=numbers), "differ in more than their width"),
    ):
        with pytest.raises(ValueError, match=message):
            pad_layers(config, tiny_params(config))
