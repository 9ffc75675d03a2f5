"""The decoder once more, in float64 NumPy with loops: what the tests of `jaxdistill.models` compare with."""

from __future__ import annotations

import math

import numpy as np

from jaxdistill.models.schema import schema
from jaxdistill.specs import (
    GatedMLP,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    MixtureOfExperts,
    ModelConfig,
    PlainMLP,
    Rope,
    YarnScaling,
)


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter away from its special value: norms around 1, biases not 0."""
    rng = np.random.default_rng(seed)
    usual = 0.0 if config.norm.one_plus else 1.0
    return {
        name: (usual if name.endswith("scale") else 0.0) + 0.3 * rng.standard_normal(spec.shape).astype(np.float32)
        for name, spec in schema(config).items()
    }


def hidden(config: ModelConfig, parameters, tokens, positions, segment_ids, points=None) -> np.ndarray:
    """[batch, length, embed]. `points`, a list, receives one dict of activations per layer."""
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    x = p["embedding.kernel"][tokens] * config.embed_scale
    for i, spec in enumerate(config.layers):
        layer = {n.removeprefix(f"layers.{i}."): v for n, v in p.items() if n.startswith(f"layers.{i}.")}
        seen = {"input": x}
        if spec.mixer is not None:
            normed = norm(config, layer, "mixer.norm", x) if spec.norms != "post" else x
            heads = attention(config, spec.mixer, layer, normed, positions, segment_ids, seen)
            mixed = np.einsum("bthd,hde->bte", heads, layer["mixer.output.kernel"]) + layer.get("mixer.output.bias", 0)
            x = x + (norm(config, layer, "mixer.post_norm", mixed) if spec.norms != "pre" else mixed)
            seen |= {"mixer_normed": normed, "heads": heads}
        if spec.ffn is not None:
            normed = norm(config, layer, "ffn.norm", x) if spec.norms != "post" else x
            run = {MixtureOfExperts: mixture, PlainMLP: plain_mlp, GatedMLP: gated_mlp}[type(spec.ffn)]
            transformed, mlp_seen = run(spec.ffn, layer, normed)
            x = x + (norm(config, layer, "ffn.post_norm", transformed) if spec.norms != "pre" else transformed)
            seen |= {"ffn_normed": normed, **mlp_seen}
        seen |= {"output": x}
        if points is not None:
            points.append(seen)
    return norm(config, p, "final_norm", x)


def norm(config: ModelConfig, parameters, name: str, x, axes=(-1,)):
    """As `config.norm` says, over these axes."""
    scale = parameters[f"{name}.scale"] + (1 if config.norm.one_plus else 0)
    if config.norm.kind == "layer":
        x = x - x.mean(axes, keepdims=True)
    normed = x / np.sqrt((x**2).mean(axes, keepdims=True) + config.norm_epsilon) * scale
    return normed + parameters[f"{name}.bias"] if config.norm.bias else normed


def plain_mlp(spec, layer, normed):
    mlp = activation(spec.activation, normed @ layer["ffn.up.kernel"] + layer.get("ffn.up.bias", 0))
    return mlp @ layer["ffn.down.kernel"] + layer.get("ffn.down.bias", 0), {"mlp": mlp}


def gated_mlp(spec, layer, normed):
    gate = normed @ layer["ffn.gate.kernel"] + layer.get("ffn.gate.bias", 0)
    up = normed @ layer["ffn.up.kernel"] + layer.get("ffn.up.bias", 0)
    mlp = activation(spec.activation, gate) * up
    return mlp @ layer["ffn.down.kernel"] + layer.get("ffn.down.bias", 0), {"mlp": mlp}


def mixture(spec, layer, normed):
    """Token by token: the experts of the largest shares, one after the other."""
    batch, length, embed = normed.shape
    choices = batch, length, spec.experts_per_token
    chosen, neurons, added = np.zeros(choices, int), np.zeros((*choices, spec.mlp)), np.zeros((*choices, embed))
    router = np.zeros((batch, length, spec.experts))
    for place in np.ndindex(batch, length):
        logits = normed[place] @ layer["ffn.router.kernel"] + layer.get("barred", 0)
        router[place] = logits
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[: spec.experts_per_token]
        total = shares[best].sum() if spec.renormalize else 1.0
        for at, expert in enumerate(best):
            gate, up = (normed[place] @ layer[f"ffn.{name}.kernel"][expert] for name in ("gate", "up"))
            neurons[place][at] = activation(spec.activation, gate) * up
            added[place][at] = shares[expert] / total * (neurons[place][at] @ layer["ffn.down.kernel"][expert])
            chosen[place][at] = expert
    return added.sum(2), {"mlp": neurons, "router": router, "chosen_experts": chosen, "experts": added}


def activation(name, x):
    match name:
        case "silu":
            return x / (1 + np.exp(-x))
        case "gelu":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        case "gelu_tanh":
            return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "relu":
            return np.where(x > 0, x, 0)
        case "relu2":
            return np.where(x > 0, x, 0) ** 2


def attention(config, spec, layer, normed, positions, segment_ids, seen):
    def project(name):
        kernel, bias = layer[f"mixer.{name}.kernel"], layer.get(f"mixer.{name}.bias", 0)
        found = np.einsum("bte,ehd->bthd", normed, kernel) + bias
        if spec.qk_norm is None or name == "value":
            return found
        return norm(config, layer, f"mixer.{name}_norm", found, (-1,) if spec.qk_norm == "head" else (-2, -1))

    query, key = (rotate(spec, project(name), positions) for name in ("query", "key"))
    value = project("value")
    seen |= {"query": query, "key": key, "value": value}
    batch, length = positions.shape
    mixed = np.zeros_like(query)
    scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
    for b in range(batch):
        for t in range(length):
            first = 0 if spec.window is None else max(0, t - spec.window + 1)
            seen_keys = [s for s in range(first, t + 1) if segment_ids[b, s] == segment_ids[b, t]]
            for h in range(spec.heads):
                kv = h // (spec.heads // spec.kv_heads)
                scores = np.array([query[b, t, h] @ key[b, s, kv] * scale for s in seen_keys])
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
                weights = np.exp(scores - scores.max())
                mixed[b, t, h] = (weights / weights.sum()) @ value[b, seen_keys, kv]
    return mixed


def rotate(spec, x, positions):
    if spec.rope is None:
        return x
    half = int(spec.head_dim * spec.rope.fraction) // 2
    factor = getattr(spec.rope.scaling, "attention_factor", 1.0)
    out = np.array(x)
    for i in range(half):
        angle = (positions * frequency(spec.rope, 2 * half, i, length=positions.shape[1]))[..., None]
        out[..., i] = factor * (x[..., i] * np.cos(angle) - x[..., i + half] * np.sin(angle))
        out[..., i + half] = factor * (x[..., i + half] * np.cos(angle) + x[..., i] * np.sin(angle))
    return out


def frequency(rope: Rope, dimensions: int, i: int, *, length: int) -> float:
    plain = 1 / rope.theta ** (2 * i / dimensions)
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as s:  # by wavelength, in three cases, as the published description has it
            wavelength = 2 * math.pi / plain
            if wavelength < s.original_length / s.high_frequency_factor:
                return plain
            if wavelength > s.original_length / s.low_frequency_factor:
                return plain / s.factor
            span = s.high_frequency_factor - s.low_frequency_factor
            smooth = (s.original_length / wavelength - s.low_frequency_factor) / span
            return (1 - smooth) * plain / s.factor + smooth * plain
        case YarnScaling() as s:  # by dimension: where a rotation of so many turns lies

            def dimension(turns: float) -> float:
                return dimensions / 2 * math.log(s.original_length / (2 * math.pi * turns)) / math.log(rope.theta)

            fast, slow = dimension(s.beta_fast), dimension(s.beta_slow)
            fast, slow = (math.floor(fast), math.ceil(slow)) if s.truncate else (fast, slow)
            fast, slow = max(fast, 0), min(slow, dimensions - 1)
            share = min(max((i - fast) / (slow - fast), 0), 1)
            return share * plain / s.factor + (1 - share) * plain
        case LongRope() as s:
            return plain / (s.short if length <= s.original_length else s.long)[i]
