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
class Rope:
    """Rotary position embedding in the half-rotation layout (the one of Hugging Face checkpoints)."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal grouped-query attention with an explicit `head_dim` (embed need not equal heads x head_dim)."""

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    """A bias on query, key and value."""
    output_bias: bool = False
    rope: Rope = dataclasses.field(default_factory=Rope)

    def __post_init__(self):
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"attention has {self.heads} query heads and {self.kv_heads} key-value heads; "
                "the first must be a positive multiple of the second."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need a positive even number.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """`down(activation(gate(x)) * up(x))`."""

    mlp: int
    activation: Activation = "silu"
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


FFN = GatedMLP | MixtureOfExperts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One block: a mixer and an ffn, each with its own pre-norm. Layers of a pruned model may differ."""

    mixer: Attention
    ffn: FFN

    @property
    def widths(self) -> dict[str, int]:
        """The sizes of this layer's own axes that pruning may cut, by axis name; without those that it lacks."""
        sizes = dataclasses.asdict(self.mixer) | dataclasses.asdict(self.ffn)
        return {axis: sizes[axis] for axis in WIDTH_AXES if axis in sizes}

    @property
    def parts(self) -> dict[str, int]:
        """How many parts each of those axes has to choose among, see `parts_of`."""
        return parts_of(self.widths)

    def with_widths(self, widths: Mapping[str, int]) -> LayerSpec:
        """This layer with other sizes of those axes."""

        def resized(part: Any) -> Any:
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
    suffixes: SuffixTable | None = None

    def __post_init__(self):
        for name in ("vocab", "embed"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.layers:
            raise ValueError("ModelConfig.layers is empty; a model has at least one layer.")

    @property
    def segments(self) -> tuple[tuple[int, LayerSpec], ...]:
        """Runs of equal layers as (run length, spec): what is scanned, and how train state stacks its layers."""
        return tuple((len(list(run)), spec) for spec, run in itertools.groupby(self.layers))

    @property
    def width_axes(self) -> tuple[str, ...]:
        """The axes of `WIDTH_AXES` that any layer has."""
        return tuple(axis for axis in WIDTH_AXES if any(axis in layer.widths for layer in self.layers))

    @property
    def homogeneous(self) -> bool:
        return len(self.segments) == 1
