"""Attention as plain functions of arrays: rotary tables, the mask, and grouped-query attention."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.specs import Attention, LinearScaling, Llama3Scaling, LongRope, Rope, YarnScaling

RopeTable = tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]
"""Cosines and sines of every position's rotation angles, float32."""

QUERY_BLOCK = 128
MAX_BLOCKS = 16


def query_block(length: int) -> int:
    """Queries per block of `causal_attention`.

    Keys behind a block's last query are never touched, so smaller blocks do less work in vain (and 128 is a tile of
    every matrix unit); their number is bounded because each is a piece of program of its own.
    """
    return max(QUERY_BLOCK, -(-length // MAX_BLOCKS))


def rope_frequencies(rope: Rope, head_dim: int, *, length: int) -> np.ndarray:
    """Radians per position of each of the rotations, context extension included (float64). length: of the rows, for
    rules that depend on it.

    Sources: RoFormer, arXiv 2104.09864 (eq. 15); position interpolation, arXiv 2306.15595; Llama 3.1's ramp as in the
    released model code; YaRN, arXiv 2309.00071, and LongRoPE, arXiv 2402.13753, as in transformers.
    """
    dimensions = rope.rotated_dimensions(head_dim)
    frequencies = rope.theta ** -(np.arange(0, dimensions, 2) / dimensions)
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / factor
        case Llama3Scaling() as s:
            turns = s.original_length * frequencies / (2 * math.pi)  # rotations within the original context
            ramp = (turns - s.low_frequency_factor) / (s.high_frequency_factor - s.low_frequency_factor)
            kept = np.clip(ramp, 0.0, 1.0)
            return frequencies * (kept + (1 - kept) / s.factor)
        case YarnScaling() as s:
            # The dimension (of pairs) that turns so many times in the original context.
            first, last = (
                dimensions * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
                for turns in (s.beta_fast, s.beta_slow)
            )
            if s.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dimensions - 1)
            divided = np.clip((np.arange(dimensions // 2) - first) / max(last - first, 0.001), 0.0, 1.0)
            return frequencies * (1 - divided + divided / s.factor)
        case LongRope() as s:
            return frequencies / np.asarray(s.short if length <= s.original_length else s.long)


def rope_table(rope: Rope, head_dim: int, positions: Int[Array, "batch length"], *, length: int) -> RopeTable:
    """Cosine and sine of position × frequency, in float32 whatever the activations are. length: of whole rows."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim, length=length), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling | LongRope) else 1.0
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"], table: RopeTable
) -> Float[Array, "batch length heads head_dim"]:
    """Apply the rotary embedding in the half-rotation layout: dimension i turns with dimension i + half. What lies
    behind twice the table's width stays as it is."""
    cos, sin = (t[:, :, None, :] for t in table)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How queries score keys; see `specs.Attention`."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None

    @classmethod
    def of(cls, spec: Attention) -> Scoring:
        return cls(spec.head_dim**-0.5 if spec.scale is None else spec.scale, spec.window, spec.soft_cap)


def attend(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    *,
    scoring: Scoring,
    query_segments: Int[Array, "batch queries"],
    key_segments: Int[Array, "batch keys"],
    query_offset: Int[Array, ""] | int = 0,
    counts: tuple[Int[Array, "batch queries"], Int[Array, "batch keys"]] | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Each query reads the keys of its own segment that do not lie behind it, nor before its window.

    Query i has index `query_offset + i` among the keys: what counts is the index within the row, never the position,
    so packed segments cannot see each other and padding (segment 0) sees padding, at least itself: its outputs are
    finite. counts: how many tokens of their row the queries and the keys are from its beginning, where padding lies
    between them; a window counts tokens. Key-value heads are shared by heads / kv_heads consecutive query heads and are
    not repeated in memory. Softmax in float32.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    # All queries of one key-value head make one matrix: large products, and no copy of the keys per query head.
    folded = query.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, kv_heads, group * queries, head_dim)
    visible = key_segments[:, None, :] == query_segments[:, :, None]
    behind = jnp.arange(queries)[:, None] + query_offset - jnp.arange(keys)
    visible &= behind >= 0
    if scoring.window is not None:
        distance = behind if counts is None else counts[0][:, :, None] - counts[1][:, None, :]
        visible &= distance < scoring.window
    scores = jnp.einsum("bnqd,bnkd->bnqk", folded, key, preferred_element_type=jnp.float32) * scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
    scores = scores.reshape(batch, kv_heads, group, queries, keys)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = weights.astype(value.dtype).reshape(batch, kv_heads, group * queries, keys)
    mixed = jnp.einsum("bnqk,bnkd->bnqd", weights, value).reshape(batch, kv_heads, group, queries, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def causal_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"],
    *,
    scoring: Scoring,
    query_block: int,
) -> Float[Array, "batch length heads head_dim"]:
    """`attend` of whole rows to themselves, in blocks of queries, each against only the keys that it may see."""
    length = query.shape[1]
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    blocks = []
    for start in range(0, length, query_block):
        end = min(start + query_block, length)
        first = 0 if scoring.window is None else max(0, start + 1 - scoring.window)
        block = attend(
            query[:, start:end],
            key[:, :, first:end],
            value[:, :, first:end],
            scoring=scoring,
            query_segments=segment_ids[:, start:end],
            key_segments=segment_ids[:, first:end],
            query_offset=start - first,
        )
        blocks.append(block)
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
