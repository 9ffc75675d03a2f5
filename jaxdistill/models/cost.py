"""What a model costs to serve, from its shape alone: parameters, memory, and a roofline estimate of latency."""

from __future__ import annotations

import dataclasses

from jaxdistill.models.flops import chosen_share, mean_keys
from jaxdistill.models.schema import count_parameters, layer_sizes
from jaxdistill.specs import LayerSpec, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device at its peak: dense 16-bit products per second (a multiply-add is two), and bytes of memory read per
    second. Vendors' figures; no program reaches both."""

    flops_per_second: float
    bytes_per_second: float


HARDWARE = {
    "a100": Hardware(flops_per_second=312e12, bytes_per_second=2.04e12),
    "h100": Hardware(flops_per_second=989e12, bytes_per_second=3.35e12),
    "h200": Hardware(flops_per_second=989e12, bytes_per_second=4.8e12),
    "tpu-v5e": Hardware(flops_per_second=197e12, bytes_per_second=0.82e12),
    "tpu-v5p": Hardware(flops_per_second=459e12, bytes_per_second=2.77e12),
    "tpu-v6e": Hardware(flops_per_second=918e12, bytes_per_second=1.64e12),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """How a model is served: rows at once, tokens of a prompt and its answer, bytes of a parameter or cached number."""

    batch_size: int = 1
    prompt: int = 4096
    answer: int = 256
    number_bytes: float = 2.0

    def __post_init__(self):
        if min(self.batch_size, self.prompt, self.answer, self.number_bytes) <= 0:
            raise ValueError(f"{self}: every field must be positive.")

    @property
    def length(self) -> int:
        return self.prompt + self.answer


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: of a mixture, the experts that it chooses."""
    idle = sum(
        sizes.get("experts", 0) * (1 - chosen_share(layer))
        for sizes, layer in zip(layer_sizes(config), config.layers, strict=True)
    )
    return count_parameters(config) - round(idle)


def cache_bytes(config: ModelConfig, workload: Workload) -> float:
    """Keys and values of all rows at their full length; a layer with a window keeps those of its window."""
    mixers = [layer.mixer for layer in config.layers if layer.mixer]
    numbers = sum(2 * mixer.kv_heads * mixer.head_dim * _kept(workload.length, mixer.window) for mixer in mixers)
    return numbers * workload.batch_size * workload.number_bytes


def _kept(length: float, window: int | None) -> float:
    """The tokens of a context whose keys are still needed."""
    return length if window is None else min(window, length)


def memory_bytes(config: ModelConfig, workload: Workload) -> float:
    """Weights and cache."""
    return count_parameters(config) * workload.number_bytes + cache_bytes(config, workload)


def latency_seconds(config: ModelConfig, workload: Workload, hardware: Hardware) -> float:
    """Time for a batch of prompts and their answers: a lower bound by the roofline of one device.

    Each attention, each feed-forward and the head takes the longer of its products at the peak rate and its weights and
    cache at the peak bandwidth; parts do not overlap, and nothing else takes time. The prompt is one pass, every token
    of the answer another one over a context of mean length, or the window of a layer that has one. Of a mixture's
    experts those are read that any of the tokens chose, if each is as likely as the others.
    """
    rows, answer = workload.batch_size, workload.answer
    context = workload.prompt + answer / 2
    sizes = layer_sizes(config)
    head = config.vocab * config.embed

    def part(products: float, tokens: float, *, attended: float = 0.0, read: float | None = None) -> float:
        flops = 2 * products * tokens + 4 * attended
        moved = (products if read is None else read) * workload.number_bytes
        return max(flops / hardware.flops_per_second, moved / hardware.bytes_per_second)

    def layer(index: int, spec: LayerSpec, tokens: float, keys: float) -> float:
        heads = (0, 0, 0) if spec.mixer is None else (spec.mixer.heads, spec.mixer.kv_heads, spec.mixer.head_dim)
        width, stored = heads[0] * heads[2], 2 * heads[1] * heads[2]
        mixer, ffn, experts = (sizes[index].get(name, 0) for name in ("mixer", "ffn", "experts"))
        attention = part(mixer, tokens, attended=width * tokens * keys, read=mixer + stored * rows * keys)
        share = chosen_share(spec)
        return attention + part(ffn + experts * share, tokens, read=ffn + experts * (1 - (1 - share) ** tokens))

    windows = [spec.mixer.window if spec.mixer else None for spec in config.layers]
    prompt = sum(
        layer(i, spec, rows * workload.prompt, mean_keys(workload.prompt, windows[i]))
        for i, spec in enumerate(config.layers)
    )
    step = sum(layer(i, spec, rows, _kept(context, windows[i])) for i, spec in enumerate(config.layers))
    step += part(head, rows)
    return prompt + part(head, rows) + answer * step
