"""What a model is, as plain frozen data: `ModelConfig` and its `LayerSpec`s. No arrays, no framework."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

WIDTH_AXES = ("kv_heads", "heads", "experts", "mlp")
"""Axes of a layer's parameters that pruning may cut; the fields of its spec that hold their sizes have these names."""

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's interpolation: long wavelengths are divided by `factor`, short ones kept, with a ramp between."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): dimensions that turn at most `beta_slow` times in the original context are divided by
    `factor`, those that turn at least `beta_fast` times are kept, with a ramp between, from whole dimension to whole
    dimension if `truncate`. attention_factor: what scores' two sides are multiplied by."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): a divisor of each frequency, one set for rows of up to `original_length` tokens and
    one for longer ones. attention_factor: what scores' two sides are multiplied by."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    attention_factor: float


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding in the half-rotation layout (the one of Hugging Face checkpoints)."""

    theta: float = 10_000.0
    scaling: Scaling | None = None
    fraction: float = 1.0
    """The share of a head's dimensions that turns, the first ones; the others do not."""

    def rotated_dimensions(self, head_dim: int) -> int:
        """How many of a head's dimensions turn, rounded down."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """What every norm of a model over its channels is: x ÷ its root mean square (its standard deviation after the mean
    is taken off), times scale (1 + scale, where models keep the difference from 1), plus a bias."""

    kind: Literal["rms", "layer"] = "rms"
    one_plus: bool = False
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal grouped-query attention with an explicit `head_dim` (embed need not equal heads x head_dim)."""

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    """A bias on query, key and value."""
    output_bias: bool = False
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    """None: positions are not told apart but by what may be seen."""
    qk_norm: Literal["head", "all"] | None = None
    """A norm of query and key before rotation: of every head by itself, or of all heads together."""
    window: int | None = None
    """A token sees so many tokens, itself the last of them; None is all of its segment up to itself."""
    scale: float | None = None
    """What scores are multiplied by; None is head_dim ** -0.5."""
    soft_cap: float | None = None
    """Scores become cap * tanh(scores / cap)."""

    def __post_init__(self):
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"attention has {self.heads} query heads and {self.kv_heads} key-value heads; "
                "the first must be a positive multiple of the second."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need a positive even number.")
        if self.rope is not None:
            self._check_rope(self.rope)

    def _check_rope(self, rope: Rope) -> None:
        rotated = rope.rotated_dimensions(self.head_dim)
        if rotated % 2:
            raise ValueError(
                f"a share (partial_rotary_factor) of {rope.fraction} of head_dim {self.head_dim} is {rotated} rotated "
                "dimensions; they turn in pairs, so an even number is needed."
            )
        if isinstance(rope.scaling, LongRope):
            counts = {"short_factor": len(rope.scaling.short), "long_factor": len(rope.scaling.long)}
            if {*counts.values()} != {rotated // 2}:
                raise ValueError(
                    f"LongRoPE has so many factors: {counts}; {rotated // 2} are needed, one for each pair of rotated "
                    "dimensions."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """`down(activation(gate(x)) * up(x))`."""

    mlp: int
    activation: Activation = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainMLP:
    """`down(activation(up(x)))`."""

    mlp: int
    activation: Activation
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Gated MLPs of which a router chooses `experts_per_token` for each token, none of them dropped."""

    experts: int
    experts_per_token: int
    mlp: int
    """Neurons of one expert."""
    activation: Activation = "silu"
    renormalize: bool = True
    """The chosen experts' shares of the router's softmax are divided by their sum (Mixtral does, OLMoE does not)."""

    def __post_init__(self):
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"a mixture has {self.experts} experts and {self.experts_per_token} of them for each token; the second "
                "must be from 1 to the first."
            )


FFN = GatedMLP | PlainMLP | MixtureOfExperts
NormPlaces = Literal["pre", "post", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One block: a mixer and an ffn, each with norms of its own. Layers of a pruned model may differ, and lack either
    half, with its norms."""

    mixer: Attention | None
    ffn: FFN | None
    norms: NormPlaces = "pre"
    """Where mixer and ffn have a norm: of what they read, of what they add to the residual stream, or both."""

    @property
    def stored(self) -> LayerSpec:
        """This layer without what no parameter's shape tells: layers with the same are kept in one stack."""
        if self.mixer is None:
            return self
        mixer = dataclasses.replace(self.mixer, rope=None, window=None, scale=None, soft_cap=None)
        return dataclasses.replace(self, mixer=mixer)

    @property
    def widths(self) -> dict[str, int]:
        """The sizes of this layer's own axes that pruning may cut, by axis name; without those that it lacks."""
        halves = [dataclasses.asdict(half) for half in (self.mixer, self.ffn) if half is not None]
        sizes = {name: value for half in halves for name, value in half.items()}
        return {axis: sizes[axis] for axis in WIDTH_AXES if axis in sizes}

    @property
    def parts(self) -> dict[str, int]:
        """How many parts each of those axes has to choose among, see `parts_of`."""
        return parts_of(self.widths)

    def with_widths(self, widths: Mapping[str, int]) -> LayerSpec:
        """This layer with other sizes of those axes."""

        def resized(part: Any) -> Any:
            if part is None:
                return None
            names = {field.name for field in dataclasses.fields(part)}
            return dataclasses.replace(part, **{name: size for name, size in widths.items() if name in names})

        return dataclasses.replace(self, mixer=resized(self.mixer), ffn=resized(self.ffn))


def parts_of(widths: Mapping[str, int]) -> dict[str, int]:
    """As the widths of a layer, but the neurons of all experts together, of which each expert keeps its own."""
    return dict(widths) | ({"mlp": widths["mlp"] * widths.get("experts", 1)} if "mlp" in widths else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuffixTable:
    """A second embedding, of a model of bytes: of the longest token of another vocabulary that ends at each byte
    (`models.suffixes`). vocab: rows of its table. nodes: of the trie of its tokens."""

    vocab: int
    nodes: int

    def __post_init__(self):
        if min(self.vocab, self.nodes) < 1:
            raise ValueError(f"{self}: both must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model. Everything that decides shapes and outputs, nothing about how it is run."""

    family: str
    """Hugging Face `model_type`; the key of `models.families.FAMILIES`."""
    vocab: int
    embed: int
    layers: tuple[LayerSpec, ...]
    tied: bool
    """The head is the embedding table."""
    norm_epsilon: float = 1e-5
    max_length: int = 2048
    """The longest context that the model was trained for, in tokens."""
    norm: Norm = dataclasses.field(default_factory=Norm)
    embed_scale: float = 1.0
    """What embeddings are multiplied by where they enter the first layer."""
    soft_cap: float | None = None
    """The head's scores become cap * tanh(scores / cap)."""
    suffixes: SuffixTable | None = None

    def __post_init__(self):
        for name in ("vocab", "embed"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.layers:
            raise ValueError("ModelConfig.layers is empty; a model has at least one layer.")

    @property
    def segments(self) -> tuple[tuple[int, LayerSpec], ...]:
        """Runs of layers whose parameters have the same shapes, as (run length, spec of the first): how layers are
        stacked. Windows and rotary embeddings may differ within one."""
        runs = (list(run) for _, run in itertools.groupby(self.layers, key=lambda spec: spec.stored))
        return tuple((len(run), run[0]) for run in runs)

    @property
    def width_axes(self) -> tuple[str, ...]:
        """The axes of `WIDTH_AXES` that any layer has."""
        return tuple(axis for axis in WIDTH_AXES if any(axis in layer.widths for layer in self.layers))

    @property
    def homogeneous(self) -> bool:
        """Whether all layers' parameters have the same shapes."""
        return len(self.segments) == 1
