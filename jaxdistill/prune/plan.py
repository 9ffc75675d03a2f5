"""What is kept of a model: indices by axis and layer, as data that can be read, edited, saved and checked.

A plan knows axes by the names that parameters give them, never a family. `prune.slice` applies it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.formats.paths import local_path, write_text
from jaxdistill.specs import WIDTH_AXES, ModelConfig

Indices = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of the axes that a plan may cut: of the whole model, and of each of its layers by axis name."""

    embed: int
    layers: tuple[Mapping[str, int], ...]

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        return cls(embed=config.embed, layers=tuple(layer.widths for layer in config.layers))

    def __str__(self) -> str:
        kinds = sorted({", ".join(f"{name} {size}" for name, size in layer.items()) for layer in self.layers})
        return f"{len(self.layers)} layers, embed {self.embed}; {' or '.join(kinds)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Indices into the original, in the order in which the smaller model has them: a subset, or only a new order.

    source: the shape of the model that the indices belong to. layers: increasing. embed: one choice for the whole
    model, since the residual stream runs through all of it. widths: for each of the axes `specs.WIDTH_AXES`, one choice
    for each kept layer; query heads stand in the order of their key-value heads, equally many for each.
    head_partners: empty, or for each kept layer and query head the head of its group whose residual its query weights
    take (W becomes W + (W - W of the partner)); itself where nothing changes.
    """

    source: Shape
    layers: Indices
    embed: Indices
    widths: Mapping[str, tuple[Indices, ...]]
    head_partners: tuple[Indices, ...] = ()

    def __post_init__(self):
        check_indices("layers", self.layers, len(self.source.layers))
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers to keep are {self.layers}; give them in increasing order.")
        check_indices("embed", self.embed, self.source.embed)
        for axis, choices in self.widths.items():
            if len(choices) != len(self.layers):
                raise ValueError(
                    f"{axis} has {len(choices)} choices for {len(self.layers)} kept layers; give one for each."
                )
            for layer, chosen in zip(self.layers, choices, strict=True):
                if axis not in self.source.layers[layer]:
                    raise ValueError(
                        f"layer {layer} has no axis {axis!r}; its axes are {sorted(self.source.layers[layer])}."
                    )
                check_indices(f"{axis} of layer {layer}", chosen, self.source.layers[layer][axis])
        if "heads" in self.widths:
            self._check_groups()

    def _check_groups(self) -> None:
        """Each kept key-value head keeps equally many of its own query heads."""
        partners = self.head_partners or self.widths["heads"]
        if [len(each) for each in partners] != [len(each) for each in self.widths["heads"]]:
            raise ValueError("head_partners does not give one head for each kept query head of each kept layer.")
        for layer, heads, groups, others in zip(
            self.layers, self.widths["heads"], self.widths["kv_heads"], partners, strict=True
        ):
            sizes = self.source.layers[layer]
            group_size, kept = sizes["heads"] // sizes["kv_heads"], len(heads) // len(groups)
            owners = tuple(head // group_size for head in heads)
            if len(heads) % len(groups) or owners != tuple(group for group in groups for _ in range(kept)):
                raise ValueError(
                    f"layer {layer} keeps the query heads {heads} and the key-value heads {groups}; query head i "
                    f"belongs to key-value head i // {group_size}, and each kept one needs equally many of its own, "
                    "in its order."
                )
            if owners != tuple(head // group_size for head in others):
                raise ValueError(
                    f"layer {layer} gives the query heads {heads} the partners {others}; a head's partner is of its "
                    f"own key-value head (head i belongs to i // {group_size})."
                )

    def resize(self, config: ModelConfig) -> ModelConfig:
        """The shape of the smaller model. Raises ValueError for another model than the plan's."""
        self.check(config)
        layers = [
            config.layers[layer].with_widths({axis: len(choices[at]) for axis, choices in self.widths.items()})
            for at, layer in enumerate(self.layers)
        ]
        return dataclasses.replace(config, embed=len(self.embed), layers=tuple(layers))

    def check(self, config: ModelConfig) -> None:
        """Refuses another model than the one whose indices these are."""
        given = Shape.of(config)
        if given != self.source:
            raise ValueError(
                f"the plan was made for a model of {self.source}; this one has {given}. Make a plan for this model."
            )

    def summary(self) -> str:
        """What is kept, in a few words."""
        depth, parts = len(self.source.layers), []
        if len(self.layers) < depth:
            parts.append(f"layers {_written(self.layers)}")
        if len(self.embed) < self.source.embed:
            parts.append(f"{len(self.embed)} of {self.source.embed} channels")
        for axis, choices in self.widths.items():
            sizes = sorted({len(chosen) for chosen in choices})
            if any(len(c) < self.source.layers[at][axis] for at, c in zip(self.layers, choices, strict=True)):
                parts.append(f"{axis} {' or '.join(map(str, sizes))}")
        return ", ".join(parts) or "everything"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, runs of indices as "first-last"."""
        return {
            "source": {"embed": self.source.embed, "layers": [dict(layer) for layer in self.source.layers]},
            "layers": _written(self.layers),
            "embed": _written(self.embed),
            "widths": {axis: [_written(chosen) for chosen in choices] for axis, choices in self.widths.items()},
            "head_partners": [_written(partners) for partners in self.head_partners],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> PrunePlan:
        """The inverse of `to_dict`. Raises ValueError for anything else."""
        try:
            source = document["source"]
            return cls(
                source=Shape(embed=int(source["embed"]), layers=tuple(dict(each) for each in source["layers"])),
                layers=_read(document["layers"]),
                embed=_read(document["embed"]),
                widths={axis: tuple(map(_read, choices)) for axis, choices in document["widths"].items()},
                head_partners=tuple(map(_read, document.get("head_partners", ()))),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this is not a prune plan ({type(error).__name__}: {error}); a plan is an object with source, layers, "
                'embed and widths, whose indices are text like "0-2 5 7-9".'
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """As a JSON file."""
        write_text(local_path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrunePlan:
        """From a JSON file. Raises ValueError, with the path, for one that is not a plan."""
        try:
            return cls.from_dict(json.loads(local_path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def whole_plan(config: ModelConfig) -> PrunePlan:
    """The plan that keeps everything as it is."""
    shape = Shape.of(config)
    return PrunePlan(
        source=shape,
        layers=tuple(range(len(shape.layers))),
        embed=tuple(range(shape.embed)),
        widths={axis: tuple(tuple(range(layer[axis])) for layer in shape.layers) for axis in WIDTH_AXES},
    )


def depth_plan(config: ModelConfig, kept: Sequence[int]) -> PrunePlan:
    """The plan that keeps some layers, each whole."""
    whole, kept = whole_plan(config), tuple(kept)
    check_indices("layers", kept, len(config.layers))
    widths = {axis: tuple(choices[layer] for layer in kept) for axis, choices in whole.widths.items()}
    return dataclasses.replace(whole, layers=kept, widths=widths)


def check_indices(name: str, indices: Indices, size: int) -> None:
    """Refuses anything but one or more different indices below a size."""
    if not indices or len(set(indices)) != len(indices) or min(indices) < 0 or max(indices) >= size:
        shown = _written(indices) if len(indices) < 50 else f"{len(indices)} indices up to {max(indices)}"
        raise ValueError(
            f"{name}: {shown or 'nothing'} is to be kept; allowed are one or more different indices from 0 to "
            f"{size - 1}."
        )


def _written(indices: Indices) -> str:
    """ "0-2 5 7-8" for (0, 1, 2, 5, 7, 8); any order is kept."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _read(text: str) -> Indices:
    indices: list[int] = []
    for run in text.split():
        first, _, last = run.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f'{run!r} is not an index or a run of them; write indices like "0-2 5 7-9".')
        indices += range(int(first), int(last or first) + 1)
    return tuple(indices)
