"""From scores to a plan: which parts of each axis stay."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.prune.importance import Importance
from jaxdistill.prune.plan import Indices, PrunePlan, Shape, check_indices
from jaxdistill.specs import LayerSpec, MixtureOfExperts, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The sizes of the smaller model; None keeps an axis as it is.

    layers: how many, or exactly which. mlp: one size for all kept layers, or one for each; in a mixture, of each
    expert. experts, heads and kv_heads count per layer; with fewer kv_heads and heads None, the query heads of a
    dropped key-value head go with it. Layers without a mixture keep what they have of experts.
    """

    layers: int | tuple[int, ...] | None = None
    embed: int | None = None
    mlp: int | tuple[int, ...] | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: int | None = None

    @property
    def changes_nothing(self) -> bool:
        return self == Target()

    @property
    def needs_scores(self) -> bool:
        """Whether something is left to choose."""
        return isinstance(self.layers, int) or self != Target(layers=self.layers)

    def certain(self, config: ModelConfig) -> bool:
        """Whether the smaller shape is known before it is chosen what stays: not where some of different layers go."""
        return not isinstance(self.layers, int) or self.layers == len(config.layers) or len({*config.layers}) == 1

    def resize(self, config: ModelConfig) -> ModelConfig:
        """The shape of the smaller model, whichever parts are chosen; of layers that differ the first ones are taken
        (see `certain`).

        Raises ValueError for sizes that the model does not have.
        """
        layers = _layers(np.zeros(len(config.layers)), self)
        whole = dataclasses.replace(self, layers=None)

        @functools.cache
        def resized(spec: LayerSpec, mlp: int) -> ModelConfig:
            # Layers of one kind are cut alike: one of them tells all.
            one = dataclasses.replace(config, layers=(spec,))
            target = dataclasses.replace(whole, mlp=mlp, experts=self.experts if "experts" in spec.widths else None)
            return choose(one, equal_importance(one), target).resize(one)

        _check_experts(config, self)
        sizes = _mlp_sizes(config, self, layers)
        cut = [resized(config.layers[layer], mlp) for layer, mlp in zip(layers, sizes, strict=True)]
        return dataclasses.replace(cut[0], layers=tuple(one.layers[0] for one in cut))


def equal_importance(config: ModelConfig) -> Importance:
    """Scores by which the first parts of each axis are kept."""
    return Importance(
        embed=np.zeros(config.embed),
        layers=np.zeros(len(config.layers)),
        widths={
            axis: tuple(np.zeros(layer.parts.get(axis, 0)) for layer in config.layers) for axis in config.width_axes
        },
    )


def choose(
    config: ModelConfig, scores: Importance, target: Target, *, sort: bool = False, merge_heads: bool = False
) -> PrunePlan:
    """The plan that keeps the parts with the highest scores; of equals the earlier one.

    Channels are ranked once for the whole model, experts, neurons and heads in each layer, query heads inside the group
    of their key-value head, neurons of a mixture inside their expert. Kept parts stay in the model's order; with `sort`
    they stand in falling order of importance, so that every prefix of an axis is the best choice of that size (nested
    models): of heads and a mixture's neurons, every prefix inside a group or an expert. Layers always keep their order.
    merge_heads: dropped query heads leave a residual in kept ones, see `PrunePlan.head_partners`. Raises ValueError for
    sizes that the model does not have.
    """
    _check_scores(config, scores)
    _check_experts(config, target)
    layers = _layers(scores.layers, target)
    widths: dict[str, list[Indices]] = {axis: [] for axis in config.width_axes}
    partners: list[Indices] = []
    for layer, mlp in zip(layers, _mlp_sizes(config, target, layers), strict=True):
        spec = config.layers[layer]
        given = {axis: values[layer] for axis, values in scores.widths.items()}
        found = _heads(spec, given, target, sort=sort) | _neurons(f"layer {layer}", spec, given, target, mlp, sort=sort)
        for axis in config.width_axes:
            widths[axis].append(found.get(axis, ()))
        heads = found.get("heads", ())
        if merge_heads and spec.mixer is not None:
            heads = _partners(heads, spec.mixer.heads // spec.mixer.kv_heads, given["heads"])
        partners.append(heads)
    embed = _best("embed", scores.embed, config.embed if target.embed is None else target.embed)
    return PrunePlan(
        source=Shape.of(config),
        layers=layers,
        embed=_ordered(embed, sort),
        widths={axis: tuple(chosen) for axis, chosen in widths.items()},
        head_partners=tuple(partners) if merge_heads else (),
    )


def _check_scores(config: ModelConfig, scores: Importance) -> None:
    """Refuses the scores of another model, and scores that cannot be ranked."""
    sizes = {"embed": [config.embed], "layers": [len(config.layers)]}
    sizes |= {axis: [layer.parts.get(axis, 0) for layer in config.layers] for axis in config.width_axes}
    arrays: dict[str, Sequence[Any]] = {"embed": [scores.embed], "layers": [scores.layers], **scores.widths}
    for axis, expected in sizes.items():
        found = [len(each) for each in arrays.get(axis, ())]
        if found != expected:
            raise ValueError(f"the scores of {axis} are for sizes {found} and the model has {expected}; measure it.")
        if not all(np.isfinite(each).all() for each in arrays[axis]):
            raise ValueError(f"the scores of {axis} are not finite; look at the model's parameters and the text.")


def _check_experts(config: ModelConfig, target: Target) -> None:
    if target.experts is not None and "experts" not in config.width_axes:
        raise ValueError(f"{target.experts} experts are to be kept, and the model has no mixture; leave experts out.")


def _layers(scores: np.ndarray, target: Target) -> Indices:
    depth = len(scores)
    if isinstance(target.layers, tuple):
        check_indices("layers", target.layers, depth)
        return target.layers
    return tuple(sorted(_best("layers", scores, depth if target.layers is None else target.layers)))


def _mlp_sizes(config: ModelConfig, target: Target, layers: Sequence[int]) -> tuple[int, ...]:
    if isinstance(target.mlp, tuple):
        if len(target.mlp) != len(layers):
            raise ValueError(
                f"mlp gives {len(target.mlp)} sizes for {len(layers)} kept layers; give one for each, or one for all."
            )
        return target.mlp
    if target.mlp is not None:
        return (target.mlp,) * len(layers)
    return tuple(config.layers[layer].widths.get("mlp", 0) for layer in layers)


def _heads(spec: LayerSpec, scores: Mapping[str, np.ndarray], target: Target, *, sort: bool) -> dict[str, Indices]:
    """Kept key-value heads, and kept query heads in their order; nothing of a layer without attention."""
    if spec.mixer is None:
        return {}
    kv_heads, size = spec.mixer.kv_heads, spec.mixer.heads // spec.mixer.kv_heads
    keep_groups = kv_heads if target.kv_heads is None else target.kv_heads
    keep = size * keep_groups if target.heads is None else target.heads
    if keep_groups < 1 or keep % keep_groups:
        raise ValueError(
            f"{keep} query heads are to be kept with {keep_groups} key-value heads; the first must be a multiple of "
            f"the second. Give heads as a multiple of {keep_groups}, up to {size * keep_groups}."
        )
    groups = _ordered(_best("kv_heads", scores["kv_heads"], keep_groups), sort)
    heads = _members("query heads of key-value head", groups, size, scores["heads"], keep // keep_groups, sort=sort)
    return {"kv_heads": groups, "heads": heads}


def _neurons(
    where: str, spec: LayerSpec, scores: Mapping[str, np.ndarray], target: Target, mlp: int, *, sort: bool
) -> dict[str, Indices]:
    """Kept neurons; in a mixture kept experts, and of each as many neurons, in their order; nothing of a layer without
    feed-forward."""
    if spec.ffn is None:
        return {}
    if not isinstance(spec.ffn, MixtureOfExperts):
        return {"mlp": _ordered(_best(f"mlp of {where}", scores["mlp"], mlp), sort)}
    keep, least = spec.ffn.experts if target.experts is None else target.experts, spec.ffn.experts_per_token
    if keep < least:
        raise ValueError(
            f"{keep} experts are to be kept in {where}, each of whose tokens chooses {least}; keep {least} or more."
        )
    experts = _ordered(_best(f"experts of {where}", scores["experts"], keep), sort)
    neurons = _members(f"mlp of {where}, expert", experts, spec.ffn.mlp, scores["mlp"], mlp, sort=sort)
    return {"experts": experts, "mlp": neurons}


def _members(name: str, groups: Indices, size: int, scores: np.ndarray, keep: int, *, sort: bool) -> Indices:
    """Of each group the best members, in the groups' order; group i has the `size` members from i · size on."""
    chosen: list[int] = []
    for group in groups:
        best = _best(f"{name} {group}", scores[group * size : (group + 1) * size], keep)
        chosen += [group * size + member for member in _ordered(best, sort)]
    return tuple(chosen)


def _partners(kept: Indices, group_size: int, scores: np.ndarray) -> Indices:
    """For each kept query head the head whose residual it takes: in its group, the worst kept one that of the best
    dropped one, the next better one that of the next, as far as there are any; itself where there is none."""
    partner = {head: head for head in kept}
    for group in sorted({head // group_size for head in kept}):
        own = range(group * group_size, (group + 1) * group_size)
        ranked = [own[i] for i in _best("query heads", scores[own.start : own.stop], group_size)]
        worst_first = [head for head in reversed(ranked) if head in partner]
        dropped = [head for head in ranked if head not in partner]
        partner |= dict(zip(worst_first, dropped, strict=False))
    return tuple(partner[head] for head in kept)


def _best(name: str, scores: np.ndarray, keep: int) -> Indices:
    """The indices of the highest scores, highest first."""
    if not 1 <= keep <= len(scores):
        raise ValueError(f"{name}: {keep} of {len(scores)} are to be kept; choose from 1 to {len(scores)}.")
    return tuple(int(i) for i in np.argsort(-np.asarray(scores), kind="stable")[:keep])


def _ordered(best: Indices, sort: bool) -> Indices:
    return best if sort else tuple(sorted(best))
