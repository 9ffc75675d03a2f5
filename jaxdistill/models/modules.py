"""The parts of a decoder as flax.nnx modules: where every parameter states its shape, axes and initialiser.

Modules are built abstractly only (`models.schema`), and called with parameters merged in by `models.decoder`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal, ones, zeros
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import RopeTable, Scoring, rotate
from jaxdistill.models.experts import choose_experts, run_experts
from jaxdistill.models.kernels import merged, product
from jaxdistill.models.suffixes import COLUMNS, empty_trie
from jaxdistill.sharding import Axes, Layout
from jaxdistill.specs import (
    Activation,
    Attention,
    GatedMLP,
    LayerSpec,
    MixtureOfExperts,
    ModelConfig,
    Norm,
    NormPlaces,
    PlainMLP,
    Rope,
    SuffixTable,
)

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""From rotated queries, rotated keys and values to each query's mix of values, and the memory to keep (a cache)."""

Points = dict[str, Any]
"""Activations that a tap may ask for, by name, and the attention's memory. What nobody asks for is not kept."""

EMBEDDING_STDDEV = 0.02
KEY_AXES = ("batch", "length", "kv_heads", None)

ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a block needs besides its parameters and its input; the same for all layers of a call."""

    ropes: Mapping[tuple[Rope, int], RopeTable]
    attend: Callable[[Scoring], Attend]
    layout: Layout
    dtype: jnp.dtype
    gates: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    """Of the layer that runs: factors [batch or 1, parts] of what its parts hand on, by point."""

    def gated(self, point: str, value: Float[Array, "batch length parts ..."]) -> Array:
        """The value, each part times its factor where there is one."""
        return value * self._factor(point, value) if point in self.gates else value

    def between(self, point: str, without: Float[Array, "batch length ..."], value: Array) -> Array:
        """The value, or what stands there without it: at a factor of 1 exactly one, at 0 exactly the other."""
        if point not in self.gates:
            return value
        # From the nearer end: in bfloat16 without + (value - without) is not value.
        factor = self._factor(point, value)
        near = factor > 0.5
        return jnp.where(near, value, without) + (factor - near) * (value - without)

    def _factor(self, point: str, value: Float[Array, "batch length parts ..."]) -> Array:
        """A point's factors in the value's dtype, as they multiply it."""
        factor = self.gates[point].astype(value.dtype)
        return factor.reshape(factor.shape[0], 1, factor.shape[1], *(1,) * (value.ndim - 3))

    def gated_choices(
        self, point: str, value: Float[Array, "batch length choices"], chosen: Int[Array, "batch length choices"]
    ) -> Array:
        """The same for values of which each belongs to the part that was chosen."""
        if point not in self.gates:
            return value
        factor = jnp.broadcast_to(self.gates[point], (value.shape[0], self.gates[point].shape[1]))
        return value * jnp.take_along_axis(factor[:, None], chosen, axis=-1).astype(value.dtype)


def parameter(
    shape: tuple[int, ...], axes: Axes, initializer: Initializer, *, inputs: int = 0, dtype: Any = None
) -> nnx.Param:
    """A parameter that names its axes under our own key (flax's own sharding keys act eagerly and want a mesh).

    inputs: of a kernel, how many axes a product sums over, which lead but for "experts". dtype: of what is no weight.
    """
    value = jnp.zeros(shape, dtype or jnp.float32)
    return nnx.Param(value, logical_axes=axes, initializer=initializer, inputs=inputs, fixed_dtype=dtype)


class Normalize(nnx.Module):
    """A norm as `specs.Norm` says, over the last axes of x, in float32: RMSNorm (arXiv 1910.07467) or LayerNorm."""

    def __init__(self, shape: tuple[int, ...], axes: Axes, norm: Norm, epsilon: float):
        self.scale = parameter(shape, axes, zeros if norm.one_plus else ones)
        if norm.bias:
            self.bias = parameter(shape, axes, zeros)
        self.norm, self.epsilon = norm, epsilon

    def __call__(self, x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
        x, scale = x.astype(jnp.float32), self.scale[...].astype(jnp.float32)
        over = tuple(range(-scale.ndim, 0))
        if self.norm.kind == "layer":
            x = x - jnp.mean(x, axis=over, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=over, keepdims=True) + self.epsilon)
        x = x * inverse * (1.0 + scale if self.norm.one_plus else scale)
        return (x + self.bias[...].astype(jnp.float32) if self.norm.bias else x).astype(dtype)


def stream_norm(config: ModelConfig) -> Normalize:
    """A norm of the residual stream, or of what is added to it."""
    return Normalize((config.embed,), ("embed",), config.norm, config.norm_epsilon)


class Normed(nnx.Module):
    """Something between the norms that its place asks for: `norm` of what is read, `post_norm` of what is added."""

    def __init__(self, places: NormPlaces, config: ModelConfig):
        if places != "post":
            self.norm = stream_norm(config)
        if places != "pre":
            self.post_norm = stream_norm(config)
        self.places = places

    def read(self, x: Array, point: str, context: Context) -> Array:
        return context.gated(point, self.norm(x, context.dtype) if self.places != "post" else x)

    def added(self, x: Array, context: Context) -> Array:
        return self.post_norm(x, context.dtype) if self.places != "pre" else x


class Linear(nnx.Module):
    """Contracts the first `inputs` axes of a kernel with the last axes of x; adds a bias of the remaining axes."""

    def __init__(self, shape: tuple[int, ...], axes: Axes, *, inputs: int, bias: bool, scale: float = 1.0):
        self.kernel = parameter(shape, axes, normal(scale * math.prod(shape[:inputs]) ** -0.5), inputs=inputs)
        if bias:
            self.bias = parameter(shape[inputs:], axes[inputs:], zeros)
        self.inputs = inputs
        self.has_bias = bias

    def __call__(self, x: Array, context: Context) -> Array:
        flat = context.layout.split("length") == 1
        y = product(x, self.kernel.get_value(), inputs=self.inputs, flat=flat)
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class AttentionMixer(Normed):
    """Grouped-query attention with its norms; returns what is added to the residual stream."""

    def __init__(self, spec: Attention, places: NormPlaces, config: ModelConfig):
        super().__init__(places, config)
        embed, head_dim = config.embed, spec.head_dim
        heads, kv_heads = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.spec = spec
        self.query = Linear((embed, spec.heads, head_dim), heads, inputs=1, bias=spec.bias)
        self.key = Linear((embed, spec.kv_heads, head_dim), kv_heads, inputs=1, bias=spec.bias)
        self.value = Linear((embed, spec.kv_heads, head_dim), kv_heads, inputs=1, bias=spec.bias)
        self.output = Linear(
            (spec.heads, head_dim, embed),
            ("heads", "head_dim", "embed"),
            inputs=2,
            bias=spec.output_bias,
            scale=residual_scale(config),
        )
        if spec.qk_norm is not None:
            self.query_norm = _head_norm(spec, spec.heads, heads[1:], config)
            self.key_norm = _head_norm(spec, spec.kv_heads, kv_heads[1:], config)

    def __call__(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Points]:
        spec, constrain = self.spec, context.layout.constrain
        normed = self.read(x, "mixer_normed", context)
        query, key = self.query(normed, context), self.key(normed, context)
        if spec.qk_norm is not None:
            query, key = self.query_norm(query, context.dtype), self.key_norm(key, context.dtype)
        if spec.rope is not None:
            query, key = (rotate(x, context.ropes[spec.rope, spec.head_dim]) for x in (query, key))
        query, key = constrain(query, ("batch", "length", "heads", None)), constrain(key, KEY_AXES)
        value = constrain(self.value(normed, context), KEY_AXES)
        heads, memory = context.attend(Scoring.of(spec))(query, key, value)
        heads = context.gated("heads", constrain(heads, ("batch", "length", "heads", None)))
        points = {"mixer_normed": normed, "query": query, "key": key, "value": value, "heads": heads}
        return self.added(self.output(heads, context), context), {**points, "memory": memory}


def _head_norm(spec: Attention, heads: int, axes: Axes, config: ModelConfig) -> Normalize:
    """Of every head by itself, or of all of them together."""
    shape, axes = ((spec.head_dim,), axes[1:]) if spec.qk_norm == "head" else ((heads, spec.head_dim), axes)
    return Normalize(shape, axes, config.norm, config.norm_epsilon)


class GatedFFN(Normed):
    """Gated feed-forward (arXiv 2002.05202) with its norms; returns what is added to the residual stream."""

    def __init__(self, spec: GatedMLP, places: NormPlaces, config: ModelConfig):
        super().__init__(places, config)
        embed, mlp = config.embed, spec.mlp
        self.spec = spec
        self.gate = Linear((embed, mlp), ("embed", "mlp"), inputs=1, bias=spec.bias)
        self.up = Linear((embed, mlp), ("embed", "mlp"), inputs=1, bias=spec.bias)
        self.down = Linear((mlp, embed), ("mlp", "embed"), inputs=1, bias=spec.bias, scale=residual_scale(config))

    def __call__(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Points]:
        normed = self.read(x, "ffn_normed", context)
        mlp = ACTIVATIONS[self.spec.activation](self.gate(normed, context)) * self.up(normed, context)
        mlp = context.gated("mlp", context.layout.constrain(mlp, ("batch", "length", "mlp")))
        return self.added(self.down(mlp, context), context), {"ffn_normed": normed, "mlp": mlp}


class PlainFFN(Normed):
    """Feed-forward without a gate, with its norms; returns what is added to the residual stream."""

    def __init__(self, spec: PlainMLP, places: NormPlaces, config: ModelConfig):
        super().__init__(places, config)
        embed, mlp = config.embed, spec.mlp
        self.spec = spec
        self.up = Linear((embed, mlp), ("embed", "mlp"), inputs=1, bias=spec.bias)
        self.down = Linear((mlp, embed), ("mlp", "embed"), inputs=1, bias=spec.bias, scale=residual_scale(config))

    def __call__(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Points]:
        normed = self.read(x, "ffn_normed", context)
        mlp = ACTIVATIONS[self.spec.activation](self.up(normed, context))
        mlp = context.gated("mlp", context.layout.constrain(mlp, ("batch", "length", "mlp")))
        return self.added(self.down(mlp, context), context), {"ffn_normed": normed, "mlp": mlp}


class ExpertKernels(nnx.Module):
    """One kernel for each expert."""

    def __init__(self, shape: tuple[int, ...], axes: Axes, *, scale: float = 1.0):
        self.kernel = parameter(shape, axes, normal(scale * shape[1] ** -0.5), inputs=1)


class MixtureFFN(Normed):
    """Mixture of experts with its norms; returns what is added to the residual stream.

    The router's softmax is float32; a token's output is the sum of its experts' outputs, weighted by it.
    """

    def __init__(self, spec: MixtureOfExperts, places: NormPlaces, config: ModelConfig):
        super().__init__(places, config)
        embed, experts, mlp = config.embed, spec.experts, spec.mlp
        self.spec = spec
        self.router = Linear((embed, experts), ("embed", "experts"), inputs=1, bias=False)
        self.gate = ExpertKernels((experts, embed, mlp), ("experts", "embed", "mlp"))
        self.up = ExpertKernels((experts, embed, mlp), ("experts", "embed", "mlp"))
        self.down = ExpertKernels((experts, mlp, embed), ("experts", "mlp", "embed"), scale=residual_scale(config))

    def __call__(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Points]:
        spec, layout = self.spec, context.layout
        normed = self.read(x, "ffn_normed", context)
        logits = layout.constrain(self.router(normed, context), ("batch", "length", None))
        shares, chosen = choose_experts(
            jax.nn.softmax(logits.astype(jnp.float32)), spec.experts_per_token, layout=layout
        )
        if spec.renormalize:
            shares = shares / shares.sum(-1, keepdims=True)
        factors = context.gates.get("mlp")
        mixed, mlp, outputs = run_experts(
            normed,
            chosen,
            context.gated_choices("experts", shares, chosen),
            {n: merged(getattr(self, n).kernel.get_value()).astype(context.dtype) for n in ("gate", "up", "down")},
            activation=ACTIVATIONS[spec.activation],
            factors=None if factors is None else factors.reshape(-1, spec.experts, spec.mlp),
            layout=layout,
        )
        points = {"ffn_normed": normed, "router": logits, "chosen_experts": chosen, "mlp": mlp, "experts": outputs}
        return self.added(mixed, context), points


class Block(nnx.Module):
    """One layer: x + mixer(x), then + ffn of that; without the half that it lacks."""

    def __init__(self, spec: LayerSpec, config: ModelConfig):
        self.spec = spec
        if spec.mixer is not None:
            self.mixer = AttentionMixer(spec.mixer, spec.norms, config)
        match spec.ffn:
            case GatedMLP():
                self.ffn = GatedFFN(spec.ffn, spec.norms, config)
            case PlainMLP():
                self.ffn = PlainFFN(spec.ffn, spec.norms, config)
            case MixtureOfExperts():
                self.ffn = MixtureFFN(spec.ffn, spec.norms, config)

    def __call__(self, x: Float[Array, "batch length embed"], context: Context) -> tuple[Array, Points]:
        points, output = {"input": x}, x
        if self.spec.mixer is not None:
            mixed, found = self.mixer(output, context)
            output, points = output + mixed, points | found
        if self.spec.ffn is not None:
            transformed, found = self.ffn(output, context)
            output, points = output + transformed, points | found
        output = context.layout.constrain(output, ("batch", "length", None))
        output = context.between("layer", x, output)
        return output, {**points, "output": output}


class Table(nnx.Module):
    """One row per vocabulary entry: an embedding, or a head of its own. inputs: 0 where no product ever reads it."""

    def __init__(self, vocab: int, embed: int, *, inputs: int = 1):
        self.kernel = parameter((vocab, embed), ("vocab", "embed"), normal(EMBEDDING_STDDEV), inputs=inputs)


class Suffixes(nnx.Module):
    """The embedding of the longest tokens that end at bytes, and the trie that finds them; fresh, it knows none."""

    def __init__(self, table: SuffixTable, config: ModelConfig):
        self.embedding = Table(table.vocab, config.embed, inputs=0)
        self.trie = parameter((table.nodes, COLUMNS), (None, None), empty_trie, dtype=jnp.int32)


class Decoder(nnx.Module):
    """The whole model, layer by layer: the per-layer view that schemas, converters and pruning name tensors by."""

    def __init__(self, config: ModelConfig):
        self.embedding = Table(config.vocab, config.embed)
        self.layers = nnx.List([Block(spec, config) for spec in config.layers])
        self.final_norm = stream_norm(config)
        if not config.tied:
            self.head = Table(config.vocab, config.embed)
        if config.suffixes is not None:
            self.suffixes = Suffixes(config.suffixes, config)


def residual_scale(config: ModelConfig) -> float:
    """Two branches a layer write to the residual stream; scaled so, its variance does not grow with depth."""
    return (2 * len(config.layers)) ** -0.5
