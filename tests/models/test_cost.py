"""Costs of a shape, against counts by hand."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import llama, mixture

from jaxdistill.models.cost import (
    Hardware,
    Workload,
    active_parameters,
    cache_bytes,
    latency_seconds,
    memory_bytes,
)
from jaxdistill.models.flops import product_parameters
from jaxdistill.models.schema import count_parameters

CONFIG = llama(layers=2, vocab=64)
WORKLOAD = Workload(batch_size=3, prompt=8, answer=4, number_bytes=2)
ATTENTION = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 16
FFN = 3 * 16 * 32 + 16


def test_memory_is_weights_and_the_cache_of_all_rows():
    assert cache_bytes(CONFIG, WORKLOAD) == 2 * (2 * 2 * 4) * 3 * 12 * 2
    assert memory_bytes(CONFIG, WORKLOAD) == 2 * count_parameters(CONFIG) + cache_bytes(CONFIG, WORKLOAD)
    assert active_parameters(CONFIG) == count_parameters(CONFIG)


def test_latency_where_arithmetic_is_the_bound():
    """With endless bandwidth: all products, at the peak rate."""
    machine = Hardware(flops_per_second=1e6, bytes_per_second=1e30)
    prompt = 2 * (2 * (ATTENTION + FFN) * 24 + 4 * 16 * 24 * 4)
    step = 2 * (2 * (ATTENTION + FFN) * 3 + 4 * 16 * 3 * 10) + 2 * 64 * 16 * 3
    expected = (prompt + 2 * 64 * 16 * 3 + 4 * step) / 1e6
    assert latency_seconds(CONFIG, WORKLOAD, machine) == pytest.approx(expected)


def test_latency_where_bandwidth_is_the_bound():
    """With endless arithmetic: every pass reads all weights and its cache."""
    machine = Hardware(flops_per_second=1e30, bytes_per_second=1e6)
    weights = 2 * (ATTENTION + FFN)
    prompt = weights + 2 * 2 * 8 * 3 * 4
    step = weights + 2 * 2 * 8 * 3 * 10 + 64 * 16
    expected = 2 * (prompt + 64 * 16 + 4 * step) / 1e6
    assert latency_seconds(CONFIG, WORKLOAD, machine) == pytest.approx(expected)


def test_a_window_bounds_what_is_cached_read_and_multiplied():
    """One layer of two sees 5 tokens: of 12 it keeps 5, a prompt's token sees 5 - 25 / 16 on average, an answer's 5."""
    near, far = CONFIG.layers
    windowed = dataclasses.replace(near, mixer=dataclasses.replace(near.mixer, window=5))
    config = dataclasses.replace(CONFIG, layers=(windowed, far))
    assert cache_bytes(config, WORKLOAD) == 2 * 2 * 4 * 3 * (5 + 12) * 2
    quick = Hardware(flops_per_second=1e30, bytes_per_second=1e6)
    read = 2 * 2 * 4 * 3 * ((4 - (5 - 25 / 16)) + 4 * (10 - 5))
    saved = latency_seconds(CONFIG, WORKLOAD, quick) - latency_seconds(config, WORKLOAD, quick)
    assert saved == pytest.approx(2 * read / 1e6)
    slow = Hardware(flops_per_second=1e6, bytes_per_second=1e30)
    attended = 4 * 16 * (24 * (4 - (5 - 25 / 16)) + 4 * 3 * (10 - 5))
    saved = latency_seconds(CONFIG, WORKLOAD, slow) - latency_seconds(config, WORKLOAD, slow)
    assert saved == pytest.approx(attended / 1e6)
    unbounded = dataclasses.replace(windowed, mixer=dataclasses.replace(windowed.mixer, window=99))
    assert cache_bytes(dataclasses.replace(CONFIG, layers=(unbounded, far)), WORKLOAD) == cache_bytes(CONFIG, WORKLOAD)


def test_a_token_meets_the_experts_that_it_chooses():
    config = mixture(experts=8, mlp=12)
    expert, others = 3 * 16 * 12, ATTENTION + 16 + 16 * 8
    assert count_parameters(config) == 2 * (others + 8 * expert) + 2 * 64 * 16 + 16
    assert active_parameters(config) == 2 * (others + 2 * expert) + 2 * 64 * 16 + 16
    kernels = others - 2 * 16  # without norms
    assert product_parameters(config) == 2 * (kernels + 2 * expert) + 64 * 16
    quick = Hardware(flops_per_second=1e30, bytes_per_second=1e6)
    one_row = Workload(batch_size=1, prompt=1, answer=1, number_bytes=2)
    cached = 2 * 2 * 2 * 4 * (0.5 + 1.5)
    both_passes = 2 * (2 * (others + 2 * expert) + 64 * 16)  # one token each: two experts are read
    assert latency_seconds(config, one_row, quick) == pytest.approx(2 * (both_passes + cached) / 1e6)
    slow = Hardware(flops_per_second=1e6, bytes_per_second=1e30)
    attended = 2 * 4 * 16 * (0.5 + 1.5)
    assert latency_seconds(config, one_row, slow) == pytest.approx((2 * both_passes + attended) / 1e6)


def test_less_of_anything_costs_no_more():
    machine = Hardware(flops_per_second=1e9, bytes_per_second=1e9)
    for smaller in (llama(layers=1, vocab=64), llama(layers=2, vocab=64, mlp=16), llama(layers=2, vocab=64, embed=8)):
        assert latency_seconds(smaller, WORKLOAD, machine) < latency_seconds(CONFIG, WORKLOAD, machine)
        assert memory_bytes(smaller, WORKLOAD) < memory_bytes(CONFIG, WORKLOAD)


def test_a_workload_of_nothing_is_refused():
    with pytest.raises(ValueError, match="every field must be positive"):
        dataclasses.replace(WORKLOAD, answer=0)
