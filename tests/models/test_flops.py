"""FLOPs by hand for a model small enough to count on paper."""

from __future__ import annotations

from tiny import llama

from jaxdistill.models.flops import forward_flops, product_parameters, training_flops

# Per layer: query 16·16, key and value 16·8 each, output 16·16, gate, up and down 16·32 each.
LAYER = 256 + 2 * 128 + 256 + 3 * 512
HEAD = 64 * 16
ATTENTION = 4 * 16 * 10 / 2


def test_products_and_attention_are_counted():
    config = llama(layers=3)
    assert product_parameters(config) == 3 * LAYER + HEAD
    assert product_parameters(llama(layers=3, tied=False)) == 3 * LAYER + HEAD
    assert forward_flops(config, 10) == 2 * (3 * LAYER + HEAD) + 3 * ATTENTION


def test_a_frozen_kernel_spares_its_gradient():
    config, untied = llama(layers=3), llama(layers=3, tied=False)
    whole = 3 * forward_flops(config, 10)
    assert training_flops(config, 10) == whole
    assert training_flops(config, 10, frozen=["embedding.kernel"]) == whole - 2 * HEAD
    assert training_flops(untied, 10, frozen=["embedding.kernel"]) == whole
    assert training_flops(untied, 10, frozen=["head.kernel", "segments.0.ffn.up.kernel"]) == whole - 2 * (
        HEAD + 3 * 512
    )
    assert training_flops(config, 10, frozen=["segments.0.ffn.norm.scale"]) == whole
