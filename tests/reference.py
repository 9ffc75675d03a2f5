"""The decoder once more, in float64 NumPy with loops: what the tests of `jaxdistill.models` compare with."""

from __future__ import annotations

import math

import numpy as np

from jaxdistill.models.schema import schema
from jaxdistill.specs import LinearScaling, Llama3Scaling, MixtureOfExperts, ModelConfig, Rope


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter away from its special value: norms around 1, biases not 0."""
    rng = np.random.default_rng(seed)
    return {
        name: (1.0 if name.endswith("scale") else 0.0) + 0.3 * rng.standard_normal(spec.shape).astype(np.float32)
        for name, spec in schema(config).items()
    }


def hidden(config: ModelConfig, parameters, tokens, positions, segment_ids, points=None) -> np.ndarray:
    """[batch, length, embed]. `points`, a list, receives one dict of activations per layer."""
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    x = p["embedding.kernel"][tokens]
    for i, spec in enumerate(config.layers):
        layer = {n.removeprefix(f"layers.{i}."): v for n, v in p.items() if n.startswith(f"layers.{i}.")}
        seen = {"input": x}
        normed = rms_norm(x, layer["mixer.norm.scale"], config.norm_epsilon)
        heads = attention(spec.mixer, layer, normed, positions, segment_ids, seen)
        x = x + np.einsum("bthd,hde->bte", heads, layer["mixer.output.kernel"]) + layer.get("mixer.output.bias", 0)
        seen |= {"mixer_normed": normed, "heads": heads}
        normed = rms_norm(x, layer["ffn.norm.scale"], config.norm_epsilon)
        transformed, mlp_seen = (mixture if isinstance(spec.ffn, MixtureOfExperts) else gated_mlp)(
            spec.ffn, layer, normed
        )
        x = x + transformed
        seen |= {"ffn_normed": normed, **mlp_seen, "output": x}
        if points is not None:
            points.append(seen)
    return rms_norm(x, p["final_norm.scale"], config.norm_epsilon)


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
    for place in np.ndindex(batch, length):
        logits = normed[place] @ layer["ffn.router.kernel"] + layer.get("barred", 0)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[: spec.experts_per_token]
        total = shares[best].sum() if spec.renormalize else 1.0
        for at, expert in enumerate(best):
            gate, up = (normed[place] @ layer[f"ffn.{name}.kernel"][expert] for name in ("gate", "up"))
            neurons[place][at] = activation(spec.activation, gate) * up
            added[place][at] = shares[expert] / total * (neurons[place][at] @ layer["ffn.down.kernel"][expert])
            chosen[place][at] = expert
    return added.sum(2), {"mlp": neurons, "chosen_experts": chosen, "experts": added}


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


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


def attention(spec, layer, normed, positions, segment_ids, seen):
    def project(name):
        kernel, bias = layer[f"mixer.{name}.kernel"], layer.get(f"mixer.{name}.bias", 0)
        return np.einsum("bte,ehd->bthd", normed, kernel) + bias

    query, key, value = (
        rotate(spec, project("query"), positions),
        rotate(spec, project("key"), positions),
        project("value"),
    )
    seen |= {"query": query, "key": key, "value": value}
    batch, length = positions.shape
    mixed = np.zeros_like(query)
    for b in range(batch):
        for t in range(length):
            seen_keys = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
            for h in range(spec.heads):
                kv = h // (spec.heads // spec.kv_heads)
                scores = np.array([query[b, t, h] @ key[b, s, kv] / math.sqrt(spec.head_dim) for s in seen_keys])
                weights = np.exp(scores - scores.max())
                mixed[b, t, h] = (weights / weights.sum()) @ value[b, seen_keys, kv]
    return mixed


def rotate(spec, x, positions):
    half = spec.head_dim // 2
    out = np.array(x)
    for i in range(half):
        angle = (positions * frequency(spec.rope, spec.head_dim, i))[..., None]
        out[..., i] = x[..., i] * np.cos(angle) - x[..., i + half] * np.sin(angle)
        out[..., i + half] = x[..., i + half] * np.cos(angle) + x[..., i] * np.sin(angle)
    return out


def frequency(rope: Rope, head_dim: int, i: int) -> float:
    plain = 1 / rope.theta ** (2 * i / head_dim)
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
