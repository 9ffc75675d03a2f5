"""The decoder as pure functions of parameters: whole rows (training, scoring) and rows that grow (a KV cache).

Parameters are the stacked tree of `models.schema`. Each run of equal layers is one `jax.lax.scan`, so a homogeneous
model compiles once whatever its depth.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxdistill.models.attention import RopeTable, Scoring, attend, causal_attention, query_block, rope_table
from jaxdistill.models.embedding import look_up
from jaxdistill.models.modules import Attend, Block, Context, stream_norm
from jaxdistill.models.schema import segment_bounds, segment_of
from jaxdistill.models.suffixes import NONE, WINDOW, longest_suffixes
from jaxdistill.sharding import Layout
from jaxdistill.specs import LayerSpec, MixtureOfExperts, ModelConfig, Rope
from jaxdistill.types import Head, Outputs, Params, Tap

TAP_POINTS = ("input", "mixer_normed", "query", "key", "value", "heads", "ffn_normed", "mlp", "output")
"""Activations of a block that a `Tap` may read, in the order in which they arise.

"input", "output": the residual stream [batch, length, embed]. "mixer_normed", "ffn_normed": after the pre-norms.
"query", "key": after rotation, and "value": [batch, length, heads or kv_heads, head_dim]. "heads": what the output
projection reads, [batch, length, heads, head_dim]. "mlp": what the down projection reads, [batch, length, mlp]; in a
mixture of experts for each choice of a token, [batch, length, choices, mlp].
"""

MIXTURE_TAP_POINTS = ("router", "chosen_experts", "experts")
"""What only layers with a mixture have besides. "router": its scores, [batch, length, experts]. "chosen_experts":
indices of experts, [batch, length, choices]. "experts": what each of them adds to the stream, [batch, length, choices,
embed]."""


def tap_points(spec: LayerSpec) -> tuple[str, ...]:
    """The points that such a layer has."""
    of_mixer = ("mixer_normed", "query", "key", "value", "heads")
    lacking = {*(of_mixer if spec.mixer is None else ()), *(("ffn_normed", "mlp") if spec.ffn is None else ())}
    more = MIXTURE_TAP_POINTS if isinstance(spec.ffn, MixtureOfExperts) else ()
    return tuple(point for point in TAP_POINTS + more if point not in lacking)


GATE_POINTS = ("mixer_normed", "heads", "ffn_normed", "mlp", "experts", "layer")
"""Where a layer's parts may be multiplied by factors; "layer" is all that it adds to the residual stream. In a mixture
the parts of "mlp" are the neurons of all experts, expert by expert."""

Gates = Mapping[str, Mapping[str, Array]]
"""Factors of what parts of a model hand on: by segment ("0", "1", …) and point, [layers, batch or 1, parts]; a "layer"
has one part. 1 changes nothing, 0 is the model without the part, and a gradient tells what the part is worth."""

Remat = Literal["none", "dots", "block"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is run, as opposed to what it is: nothing here changes a result beyond rounding."""

    activation_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations and of the products with parameters; norms and softmax are always float32."""
    remat: Remat = "dots"
    """What is kept for the backward pass. "dots": results of products with parameters, and of attention; the rest,
    cheap, is recomputed. "block": only each block's input; for one forward pass more, the least memory. "none":
    everything; here for comparison, it took more memory and more time than "dots" wherever it was measured."""

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.activation_dtype)


class TokenRows(Protocol):
    """What the decoder reads of a batch; every field is [batch, length]. `types.Batch` is one."""

    @property
    def tokens(self) -> Any: ...
    @property
    def positions(self) -> Any: ...
    @property
    def segment_ids(self) -> Any: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Token rows without targets. Segment 0 is padding; positions count within a segment."""

    tokens: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the slots filled so far, per segment of layers.

    keys, values: {segment: [layers, batch, kv_heads, slots, head_dim]}. segment_ids: [batch, slots], 0 where a slot
    is empty or padding. used: how many slots are filled; all rows fill the same slots, shorter ones with padding.
    recent: the last tokens and their segment ids, for a model that reads suffixes.
    """

    keys: dict[str, Array]
    values: dict[str, Array]
    segment_ids: Int[Array, "batch slots"]
    used: Int[Array, ""]
    recent: Int[Array, "2 batch window"] | None = None


def apply(
    config: ModelConfig,
    params: Params,
    rows: TokenRows,
    *,
    layout: Layout = Layout(),
    execution: Execution = Execution(),
    taps: Mapping[str, Tap] | None = None,
    gates: Gates | None = None,
) -> Outputs:
    """Hidden states after the final norm for whole rows, and the head that turns them into scores.

    A token sees the tokens before it in its row that have its segment id; `positions` enter the rotary embedding
    only. `taps` maps a name of the caller's choice to a `Tap`; its result is in `Outputs.taps`, stacked over layers.
    `gates` multiply what the named parts hand on, before it is tapped.
    Hidden states are in the activation dtype; at padding they are finite and mean nothing.
    """
    taps, gates = dict(taps or {}), dict(gates or {})
    _check_taps(config, taps)
    _check_gates(config, gates)
    context = _context(config, rows, _row_attention(rows, layout), layout, execution, length=rows.tokens.shape[1])
    mask = (rows.segment_ids > 0).astype(jnp.float32)
    suffixes = None if config.suffixes is None else _suffixes(config, params, rows.tokens, rows.segment_ids)
    x = _embed(config, params, rows.tokens, suffixes, layout, execution)
    seen: dict[str, list[Any]] = {name: [] for name in taps}
    for run in _tapped_runs(config, taps):
        active = {name: tap for name, tap in taps.items() if _taps_layer(tap, run.first)}

        def layer(place: int, x: Array, layers: tuple[Params, Any], run=run, active=active) -> tuple[Array, Any]:
            # What is cut out of a turn's parameters in here is not kept for the backward pass.
            parameters, factors = run.layer(layers, place)
            block = _merge(run.specs[place], config, parameters)
            x, points = block(x, dataclasses.replace(context, gates=factors))
            return x, {name: tap.reduce({p: points[p] for p in tap.points}, mask) for name, tap in active.items()}

        def period(x: Array, layers: tuple[Params, Any], run=run, layer=layer) -> tuple[Array, Any]:
            results = []
            for place in range(len(run.specs)):
                x, result = _rematerialised(functools.partial(layer, place), execution.remat)(x, layers)
                results.append(result)
            return x, jax.tree.map(lambda *each: jnp.stack(each), *results)

        stacked = segment_of(params, run.segment), dict(gates.get(run.segment, {}))
        x, results = jax.lax.scan(period, x, run.of(stacked), length=run.repeats)
        for name, result in jax.tree.map(run.in_a_row, results).items():
            seen[name].append(result)
    hidden = _finish(config, params, x, layout, execution)
    return Outputs(hidden=hidden, head=head_of(config, params), taps={n: _concatenate(n, r) for n, r in seen.items()})


CACHE_AXES = ("layers", "batch", "kv_heads", None, None)


def init_cache(
    config: ModelConfig,
    batch: int,
    slots: int,
    *,
    layout: Layout = Layout(),
    execution: Execution = Execution(),
) -> Cache:
    """An empty cache for `batch` rows of up to `slots` tokens, in the activation dtype."""

    def zeros(size: int, spec: LayerSpec) -> Array:
        heads = (0, 0) if spec.mixer is None else (spec.mixer.kv_heads, spec.mixer.head_dim)
        shape = (size, batch, heads[0], slots, heads[1])
        return layout.constrain(jnp.zeros(shape, execution.dtype), CACHE_AXES)

    return Cache(
        keys={str(i): zeros(*segment) for i, segment in enumerate(config.segments)},
        values={str(i): zeros(*segment) for i, segment in enumerate(config.segments)},
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        used=jnp.zeros((), jnp.int32),
        recent=None if config.suffixes is None else jnp.zeros((2, batch, WINDOW), jnp.int32),
    )


def apply_cached(
    config: ModelConfig,
    params: Params,
    rows: TokenRows,
    cache: Cache,
    *,
    layout: Layout = Layout(),
    execution: Execution = Execution(),
) -> tuple[Outputs, Cache]:
    """Continue rows: the new tokens fill the next slots and see themselves and what the cache holds.

    Serves both the prompt (all its tokens at once, shorter prompts padded with segment 0 on either side) and single
    steps. The caller keeps `cache.used` + new tokens within the slots; positions are the caller's, per row.
    """
    start = cache.used
    segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, rows.segment_ids.astype(jnp.int32), (0, start))
    tokens_so_far = jnp.cumsum(segment_ids > 0, axis=1)
    counts = jax.lax.dynamic_slice(tokens_so_far, (0, start), rows.segment_ids.shape), tokens_so_far

    def attend_cached(
        scoring: Scoring, keys: Array, values: Array, layer: Array, query: Array, key: Array, value: Array
    ):
        def write(memory: Array, new: Array) -> Array:
            new = new.transpose(0, 2, 1, 3)[None].astype(memory.dtype)
            return jax.lax.dynamic_update_slice(memory, new, (layer, 0, 0, start, 0))

        keys, values = write(keys, key), write(values, value)
        heads = attend(
            query,
            jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(values, layer, keepdims=False),
            scoring=scoring,
            query_segments=rows.segment_ids,
            key_segments=segment_ids,
            query_offset=start,
            counts=counts,
        )
        return heads, (keys, values)

    suffixes = recent = None
    if cache.recent is not None:
        recent = jnp.concatenate([cache.recent, jnp.stack([rows.tokens, rows.segment_ids])], axis=-1)
        suffixes = _suffixes(config, params, *recent)[:, WINDOW:]
        recent = recent[..., -WINDOW:]
    x = _embed(config, params, rows.tokens, suffixes, layout, execution)
    # Rows as long as the cache may become: what a prompt is rotated by must not change on the way.
    context = _context(config, rows, lambda scoring: None, layout, execution, length=cache.segment_ids.shape[1])
    new_keys, new_values = dict(cache.keys), dict(cache.values)
    for run in _tapped_runs(config, {}):

        def period(carry, layers_and_indices, run=run):
            x, keys, values = carry
            for place, spec in enumerate(run.specs):
                here, at = run.layer(layers_and_indices, place)

                def attend_here(scoring: Scoring, keys=keys, values=values, index=at) -> Attend:
                    return functools.partial(attend_cached, scoring, keys, values, index)

                x, points = _merge(spec, config, here)(x, dataclasses.replace(context, attend=attend_here))
                keys, values = points.get("memory", (keys, values))
            return (x, keys, values), None

        name = run.segment
        carry = (x, new_keys[name], new_values[name])
        layers = run.of((segment_of(params, name), jnp.arange(len(new_keys[name]))))
        (x, new_keys[name], new_values[name]), _ = jax.lax.scan(period, carry, layers)
    hidden = _finish(config, params, x, layout, execution)
    used = start + rows.tokens.shape[1]
    return Outputs(hidden=hidden, head=head_of(config, params)), Cache(new_keys, new_values, segment_ids, used, recent)


def head_of(config: ModelConfig, params: Params) -> Head:
    """The output head: the embedding table itself when tied. Kept in the parameters' dtype."""
    return Head(kernel=params["embedding" if config.tied else "head"]["kernel"], soft_cap=config.soft_cap)


def scores(hidden: Float[Array, "... embed"], head: Head) -> Float[Array, "... vocab"]:
    """Float32 scores of a few positions (generation, tests). Never for a whole batch: see `losses` for that."""
    kernel = head.kernel.astype(hidden.dtype)
    values = jnp.einsum("...e,ve->...v", hidden, kernel, preferred_element_type=jnp.float32)
    if head.bias is not None:
        values += head.bias.astype(jnp.float32)
    return values if head.soft_cap is None else head.soft_cap * jnp.tanh(values / head.soft_cap)


def _context(
    config: ModelConfig, rows: TokenRows, attend: Any, layout: Layout, execution: Execution, *, length: int
) -> Context:
    """Rotary tables are made here, once per distinct rope, outside the layer scans. length: of whole rows."""
    kinds = {(spec.mixer.rope, spec.mixer.head_dim) for spec in config.layers if spec.mixer is not None}
    ropes: dict[tuple[Rope, int], RopeTable] = {
        (rope, head_dim): rope_table(rope, head_dim, rows.positions, length=length)
        for rope, head_dim in kinds
        if rope is not None
    }
    return Context(ropes=ropes, attend=attend, layout=layout, dtype=execution.dtype)


def _row_attention(rows: TokenRows, layout: Layout) -> Callable[[Scoring], Attend]:
    length = rows.tokens.shape[1]
    # Blocks are cut out of the row: not when the row itself is spread over devices.
    block = query_block(length) if layout.split("length") == 1 else length

    def attention(scoring: Scoring, query: Array, key: Array, value: Array) -> tuple[Array, None]:
        heads = causal_attention(query, key, value, rows.segment_ids, scoring=scoring, query_block=block)
        return checkpoint_name(heads, "heads"), None

    return lambda scoring: functools.partial(attention, scoring)


def _suffixes(config: ModelConfig, params: Params, tokens: Array, segment_ids: Array) -> Array:
    return longest_suffixes(params["suffixes"]["trie"], tokens, segment_ids, vocab=config.vocab)


def _embed(
    config: ModelConfig, params: Params, tokens: Array, suffixes: Array | None, layout: Layout, execution: Execution
) -> Array:
    x = look_up(params["embedding"]["kernel"], tokens, layout=layout, dtype=execution.dtype)
    if suffixes is not None:
        table = params["suffixes"]["embedding"]["kernel"]
        longest = look_up(table, jnp.maximum(suffixes, 0), layout=layout, dtype=execution.dtype)
        x += jnp.where((suffixes == NONE)[..., None], 0, longest)
    if config.embed_scale != 1.0:
        # In the activations' type, as published models have it.
        x *= jnp.asarray(config.embed_scale, x.dtype)
    return layout.constrain(x, ("batch", "length", None))


def _finish(config: ModelConfig, params: Params, x: Array, layout: Layout, execution: Execution) -> Array:
    norm = nnx.merge(_norm_definition(config), params["final_norm"])
    return layout.constrain(norm(x, execution.dtype), ("batch", "length", None))


@functools.lru_cache(maxsize=256)
def _definition(spec: LayerSpec, config: ModelConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Block(spec, config)))[0]


@functools.lru_cache(maxsize=64)
def _norm_definition(config: ModelConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: stream_norm(config)))[0]


def _merge(spec: LayerSpec, config: ModelConfig, layer: Params) -> Block:
    return nnx.merge(_definition(spec, config), layer)


def _rematerialised(body: Any, remat: Remat) -> Any:
    match remat:
        case "none":
            return body
        case "dots":
            # Products without batch dimensions are those with parameters; those of experts have a name. Keeping what
            # attention returns as well leaves only its weights to redo, which outweigh all else that is kept.
            policies = jax.checkpoint_policies
            policy = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("heads", "expert_products")
            )
            return jax.checkpoint(body, policy=policy, prevent_cse=False)
        case "block":
            return jax.checkpoint(body, prevent_cse=False)


def _taps_layer(tap: Tap, layer: int) -> bool:
    return tap.layers is None or layer in tap.layers


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers that one scan goes through: a few specs in turn, `repeats` times. first: the first layer's index in the
    model, offset: in its segment."""

    segment: str
    first: int
    offset: int
    specs: tuple[LayerSpec, ...]
    repeats: int

    def of(self, stacked: Any) -> Any:
        """This run's part of a segment's leaves: [repeats, specs, ...], or [repeats, ...] of a single spec. (For an
        axis of one XLA copies the leaf on a CPU. A run that is not its whole segment is cut out, a copy as well.)"""
        specs = len(self.specs)
        part = jax.tree.map(lambda leaf: leaf[self.offset : self.offset + self.repeats * specs], stacked)
        if specs == 1:
            return part
        return jax.tree.map(lambda leaf: leaf.reshape(self.repeats, specs, *leaf.shape[1:]), part)

    def layer(self, turn: Any, place: int) -> Any:
        """One layer's leaves of a turn's, which is what a scan over `of` sees."""
        return turn if len(self.specs) == 1 else jax.tree.map(lambda leaf: leaf[place], turn)

    def in_a_row(self, result: Array) -> Array:
        """What was found layer by layer, [layers, ...], from [repeats, specs, ...]: `specs` may be one here."""
        return result.reshape(-1, *result.shape[2:])


def _tapped_runs(config: ModelConfig, taps: Mapping[str, Tap]) -> Iterator[Run]:
    """All layers in order, in runs with the same taps.

    A scan returns something for each of its layers; cutting segments where taps begin and end is what keeps the
    memory of a tap to the layers that it asked for, forward and backward.
    """
    for segment, (start, stop) in enumerate(segment_bounds(config)):
        first = start
        for layer in range(start + 1, stop + 1):
            if layer < stop and all(_taps_layer(t, layer) == _taps_layer(t, first) for t in taps.values()):
                continue
            for specs, repeats in _periods(config.layers[first:layer]):
                yield Run(str(segment), first, first - start, specs, repeats)
                first += repeats * len(specs)


def _periods(specs: Sequence[LayerSpec]) -> list[tuple[tuple[LayerSpec, ...], int]]:
    """Layers as (a few specs in turn, how often): the shortest turn that all follow, and what is left of it; where they
    follow none, runs of equal layers."""
    turn = next(n for n in range(1, len(specs) + 1) if all(a == b for a, b in zip(specs, specs[n:], strict=False)))
    repeats = len(specs) // turn
    if repeats == 1 and len({*specs}) > 1:
        runs = [list(run) for _, run in itertools.groupby(specs)]
        return [((run[0],), len(run)) for run in runs]
    rest = specs[repeats * turn :]
    return [(tuple(specs[:turn]), repeats), *(_periods(rest) if rest else [])]


def _check_taps(config: ModelConfig, taps: Mapping[str, Tap]) -> None:
    for name, tap in taps.items():
        depth = len(config.layers)
        layers = tap.layers
        tapped = [config.layers[i] for i in (range(depth) if layers is None else layers) if 0 <= i < depth]
        points = tuple(p for p in TAP_POINTS + MIXTURE_TAP_POINTS if all(p in tap_points(layer) for layer in tapped))
        unknown = [p for p in tap.points if p not in points]
        if unknown:
            raise ValueError(f"tap {name!r} asks for the points {unknown}; allowed are {points}.")
        if layers is not None and (not layers or list(layers) != sorted({i for i in layers if 0 <= i < depth})):
            raise ValueError(
                f"tap {name!r} asks for the layers {layers}; allowed are increasing indices from 0 to {depth - 1}, "
                "or None for all."
            )


def _check_gates(config: ModelConfig, gates: Gates) -> None:
    segments = {str(i): size for i, (size, _) in enumerate(config.segments)}
    for segment, factors in gates.items():
        wrong = {point: f.shape for point, f in factors.items() if point not in GATE_POINTS or f.ndim != 3}
        if segment not in segments or wrong or any(f.shape[0] != segments[segment] for f in factors.values()):
            shapes = {point: f.shape for point, f in factors.items()}
            raise ValueError(
                f"gates of segment {segment!r} are {shapes}; allowed are the segments {sorted(segments)}, the points "
                f"{GATE_POINTS}, and shapes [layers of the segment, batch or 1, parts]."
            )


def _concatenate(name: str, results: list[Any]) -> Any:
    """One tap's results over its layers, in order, from the runs that they were made in."""
    if len(results) == 1:
        return results[0]
    shapes = [jax.tree.map(lambda x: x.shape[1:], r) for r in results]
    if any(s != shapes[0] for s in shapes):
        raise ValueError(
            f"tap {name!r} returns different shapes in different layers ({shapes}), which cannot be stacked; "
            "use one tap for each group of layers of equal shape."
        )
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
