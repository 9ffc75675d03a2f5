"""Moving a model to another tokenizer: where the rows of its embedding and head start."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.align.edit_distance import Progress, minimum_edit_map
from jaxdistill.models.schema import param_shardings
from jaxdistill.models.suffixes import BYTES, build_trie
from jaxdistill.sharding import Layout, names_of
from jaxdistill.specs import ModelConfig, SuffixTable
from jaxdistill.tokenizers.base import TURN_ENDS, SpecialTokens, Tokenizer
from jaxdistill.tokenizers.vocabulary import ordinary_ids
from jaxdistill.types import Params

Kind = Literal["role", "exact", "decomposed", "drawn"]
"""Where a row comes from: the old token of the same role, the old token of the same bytes (a special one of the same
string), the mean of several old tokens, or chance."""

TABLE_AXES = ("vocab", "embed")
BLOCK_ROWS = 4096
"""So many new rows are made at a time."""


@dataclasses.dataclass(frozen=True)
class VocabularyMap:
    """For each new id, the old ids whose rows it starts as the mean of; none for a row that is drawn."""

    sources: tuple[tuple[int, ...], ...]
    kinds: tuple[Kind, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows are of each kind."""
        return dict(collections.Counter(self.kinds))


def map_vocabulary(old: Tokenizer, new: Tokenizer) -> VocabularyMap:
    """Fast vocabulary transfer (Gee et al. 2022, arXiv 2402.09977), as ALM does it.

    Special tokens by role, or by their string; other tokens by their bytes; what is left by its decomposition: that
    of its text by the old tokenizer, where it has these very bytes, else the longest old tokens from left to right.
    """
    vocabulary, known = new.token_bytes(), ordinary_ids(old)
    special = {token: text for text, token in new.special.all.items()}
    found: dict[int, tuple[tuple[int, ...], Kind]] = {}
    for token, spelled in enumerate(vocabulary):
        if token in special:
            source = _special_source(token, special[token], old.special, new.special)
        else:
            source = (known[spelled], "exact") if spelled in known else None
        if source is not None:
            found[token] = (source[0],), source[1]
    left = [token for token in range(len(vocabulary)) if token not in found]
    for token, ids in zip(left, decompose([vocabulary[token] for token in left], old), strict=True):
        found[token] = ids, "decomposed" if ids else "drawn"
    sources, kinds = zip(*(found[token] for token in range(len(vocabulary))), strict=True)
    return VocabularyMap(sources, kinds)


def carried_ids(student: Tokenizer, teacher: Tokenizer, *, progress: Progress = lambda done, total: None) -> np.ndarray:
    """For each of the student's ids the teacher's whose probability it takes, int32; -1 for none.

    Special tokens by what they do, as in `map_vocabulary`; ordinary ones by the smallest edit distance of their bytes
    to ordinary ones (`align.edit_distance`).
    """
    special = {*teacher.special.all.values()}
    vocabulary = teacher.token_bytes()
    ordinary = np.array([token for token in range(len(vocabulary)) if token not in special])
    theirs = [vocabulary[token] for token in ordinary]
    found = ordinary[minimum_edit_map(student.token_bytes(), theirs, progress=progress)]
    for text, token in student.special.all.items():
        source = _special_source(token, text, teacher.special, student.special)
        found[token] = -1 if source is None else source[0]
    return found.astype(np.int32)


def _special_source(token: int, text: str, old: SpecialTokens, new: SpecialTokens) -> tuple[int, Kind] | None:
    """The old token that does what a special one does, or has its string. Beginning and end of a text are what they
    are whatever they are called; of the other roles the string says more."""

    def same_role(*roles: str) -> tuple[int, Kind] | None:
        ids = (getattr(old, role) for role in roles if getattr(new, role) == token)
        return next(((id, "role") for id in ids if id is not None), None)

    if (source := same_role("eos", "bos")) is not None:
        return source
    if text in old.all:
        return old.all[text], "exact"
    if text in TURN_ENDS:
        end = min((id for name, id in old.all.items() if name in TURN_ENDS), default=old.eos)
        return None if end is None else (end, "role")
    if token in new.stop and old.eos is not None:
        return old.eos, "role"
    return same_role("unk", "pad")


def decompose(tokens: Sequence[bytes], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Ids of the tokenizer that spell each of these byte strings.

    As the tokenizer encodes the text, if that spells it exactly. A prefix that it adds is no part of a token, so the
    text is also tried without its own first space, and after a line break. What is no text, or is spelled otherwise, is
    read from left to right, each time the longest token; bytes that no token begins with are left out.
    """
    vocabulary, known = tokenizer.token_bytes(), ordinary_ids(tokenizer)
    found: dict[int, tuple[int, ...]] = {}
    texts = {index: text for index, token in enumerate(tokens) if (text := _text(token)) is not None}
    for before, cut in (("", ""), ("", " "), ("\n", "")):
        tried = {i: before + text[len(cut) :] for i, text in texts.items() if i not in found and text.startswith(cut)}
        for index, encoding in zip(tried, tokenizer.encode_batch(list(tried.values())), strict=True):
            ids = _behind(before.encode(), encoding.ids.tolist(), vocabulary)
            if b"".join(vocabulary[token] for token in ids) == tokens[index]:
                found[index] = tuple(ids)
    longest = max(map(len, known), default=0)
    return [found.get(i) or _longest_first(token, known, longest) for i, token in enumerate(tokens)]


def _text(token: bytes) -> str | None:
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _behind(before: bytes, ids: list[int], vocabulary: Sequence[bytes]) -> list[int]:
    """What follows the tokens that spell this, with or without the space of a prefix; nothing where none do."""
    spelled = b""
    for count, token in enumerate([None, *ids]):
        spelled += b"" if token is None else vocabulary[token]
        if spelled == before or (before and spelled == b" " + before):
            return ids[count:]
    return []


def _longest_first(token: bytes, known: Mapping[bytes, int], longest: int) -> tuple[int, ...]:
    ids, at = [], 0
    while at < len(token):
        ends = range(min(len(token), at + longest), at, -1)
        end = next((end for end in ends if token[at:end] in known), None)
        if end is not None:
            ids.append(known[token[at:end]])
        at = end or at + 1
    return tuple(ids)


def retokenize_model(
    config: ModelConfig,
    params: Params,
    old: Tokenizer,
    new: Tokenizer,
    *,
    key: jax.Array,
    layout: Layout = Layout(),
    multiple: int = 1,
    suffixes: bool = False,
) -> tuple[ModelConfig, Params, VocabularyMap]:
    """The model for another tokenizer, and where its rows come from: an embedding, and a head of its own if it has one,
    for the new ids; all other leaves are the arrays that were given.

    A row that nothing is known of is drawn per channel from a normal distribution with the mean and the standard
    deviation of the old rows. The vocabulary is rounded up to a multiple; the rows of padding are the mean of all
    others, so that their score is the mean score and the probability of each, by Jensen's inequality, never above
    1 / vocabulary. Tables are read and written in their places; nobody holds more than its shard of the new ones.

    suffixes: a model of bytes also keeps the old embedding, and adds to its input that of the longest old token which
    ends at each byte (`models.suffixes`).

    Raises ValueError for a model that has fewer ids than its tokenizer, and for suffixes of what is not bytes.
    """
    check_suffixes(config, new, suffixes=suffixes)
    if config.vocab < old.vocab_size or multiple < 1:
        raise ValueError(
            f"the model has {config.vocab} ids, its tokenizer {old.vocab_size}, and the multiple is {multiple}; give "
            "the tokenizer that the model was trained with, and a multiple of at least 1."
        )
    rows = map_vocabulary(old, new)
    shape = -(-len(rows.kinds) // multiple) * multiple, config.embed
    move = _mover(layout, shape=shape, old_ids=old.vocab_size, new_ids=len(rows.kinds))
    drawn = np.array([kind == "drawn" for kind in rows.kinds] + [False] * (shape[0] - len(rows.kinds)))
    entries = _entries(rows, _block_starts(layout, shape))
    tables = ("embedding",) if config.tied else ("embedding", "head")
    moved = {
        name: {"kernel": move(params[name]["kernel"], jax.random.fold_in(key, index), drawn, *entries)}
        for index, name in enumerate(tables)
    }
    made = dataclasses.replace(config, vocab=shape[0])
    if suffixes:
        trie = _trie(rows, old, vocab=made.vocab)
        made = dataclasses.replace(made, suffixes=SuffixTable(vocab=config.vocab, nodes=len(trie)))
        kept = {"embedding": params["embedding"], "trie": trie}
        moved["suffixes"] = jax.device_put(kept, param_shardings(made, layout)["suffixes"])
    return made, params | moved, rows


def check_suffixes(config: ModelConfig, new: Tokenizer, *, suffixes: bool) -> None:
    """Refuses to move a model that reads suffixes, and suffixes of what is not bytes."""
    if config.suffixes is not None:
        raise ValueError(
            "the model reads the suffixes of its bytes in another vocabulary, which have no place among other tokens; "
            "move the model that it was made from."
        )
    if suffixes and new.token_bytes()[:BYTES] != [bytes([byte]) for byte in range(BYTES)]:
        raise ValueError(
            f"suffixes are of bytes, and the first {BYTES} ids of the new tokenizer are others; use the tokenizer "
            '"bytes", or leave suffixes out.'
        )


def _trie(rows: VocabularyMap, old: Tokenizer, *, vocab: int) -> np.ndarray:
    """Of the old tokens, with the old special ones that the new ones were made of."""
    kinds = enumerate(zip(rows.sources, rows.kinds, strict=True))
    carried = {id: source[0] for id, (source, kind) in kinds if id >= BYTES and kind in ("role", "exact")}
    return build_trie(ordinary_ids(old), carried, vocab=vocab)


def _mover(layout: Layout, *, shape: tuple[int, int], old_ids: int, new_ids: int) -> Callable[..., Array]:
    """The compiled function (old table, key, which rows are drawn, entries) → new table."""

    def move(table: Float[Array, "old embed"], key: Array, drawn: Array, *entries: Array) -> Float[Array, "new embed"]:
        known = (jnp.arange(table.shape[0]) < old_ids)[:, None]
        values = table.astype(jnp.float32)
        mean = jnp.where(known, values, 0).sum(0) / old_ids
        deviation = jnp.sqrt(jnp.where(known, jnp.square(values - mean), 0).sum(0) / old_ids)
        chance = mean + deviation * jax.random.normal(key, shape)
        made = jnp.where(drawn[:, None], chance, _means(table, entries, layout, shape))
        real = (jnp.arange(shape[0]) < new_ids)[:, None]
        average = jnp.where(real, made, 0).sum(0) / new_ids
        return jnp.where(real, made, average).astype(table.dtype)

    return jax.jit(move, out_shardings=layout.sharding(TABLE_AXES, shape))


def _shards(layout: Layout, shape: tuple[int, ...]) -> tuple[tuple[str, ...], int]:
    """The mesh axes that split the rows of a table of this shape, and into how many shards."""
    axes = () if layout.mesh is None else names_of(layout.spec(TABLE_AXES, shape)[0])
    return axes, layout.split("vocab") if axes else 1


def _block_starts(layout: Layout, shape: tuple[int, int]) -> list[int]:
    """The first rows of the blocks that a new table is made in, shard after shard."""
    _, parts = _shards(layout, shape)
    size = shape[0] // parts
    return [part * size + start for part in range(parts) for start in range(0, size, BLOCK_ROWS)]


def _means(
    table: Array, entries: tuple[Array, ...], layout: Layout, shape: tuple[int, int]
) -> Float[Array, "new embed"]:
    """The mean of the sources of each row, in float32; 0 where there are none.

    Every device adds up its own old rows for one block of new rows after the other, and keeps the blocks of its shard.
    """
    across, _ = _shards(layout, table.shape)
    kept, parts = _shards(layout, shape)
    size, blocks = shape[0] // parts, len(entries[0]) // parts

    def local(table: Array, *entries: Array) -> Array:
        first = jax.lax.axis_index(across) * table.shape[0] if across else 0
        mine = jax.lax.axis_index(kept) if kept else 0

        def add(own: Array, block: tuple[Array, ...]) -> tuple[Array, None]:
            number, source, target, weight = block
            row = source - first
            here = (row >= 0) & (row < table.shape[0])
            values = table[jnp.where(here, row, 0)].astype(jnp.float32) * jnp.where(here, weight, 0)[:, None]
            total = jax.ops.segment_sum(values, target, BLOCK_ROWS)
            total = jax.lax.psum(total, across) if across else total
            at = (number % blocks * BLOCK_ROWS, 0)
            before = jax.lax.dynamic_slice(own, at, total.shape)
            return jax.lax.dynamic_update_slice(own, jnp.where(number // blocks == mine, total, before), at), None

        own = jnp.zeros((blocks * BLOCK_ROWS, table.shape[1]), jnp.float32)
        return jax.lax.scan(add, own, (jnp.arange(parts * blocks), *entries))[0][:size]

    if layout.mesh is None:
        return local(table, *entries)
    run = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.spec(TABLE_AXES, table.shape), *(jax.sharding.PartitionSpec(),) * len(entries)),
        out_specs=layout.spec(TABLE_AXES, shape),
        check_vma=False,  # that sums over all shards are equal on all devices is true and cannot be inferred
    )
    return run(table, *entries)


def _entries(rows: VocabularyMap, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Old ids, new rows and weights [blocks, entries] of the pairs of each block of new rows, by its first row; rows
    count within a block, and blocks are filled up with weights of 0."""
    counts = np.array([len(found) for found in rows.sources])
    row = np.repeat(np.arange(len(counts)), counts)
    source = np.array([token for found in rows.sources for token in found], np.int32)
    ends = np.append(np.searchsorted(row, starts), len(row))
    shape = len(starts), max(1, int(np.diff(ends).max()))
    sources, targets, weights = (np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.float32))
    for block, (first, (start, stop)) in enumerate(zip(starts, itertools.pairwise(ends), strict=True)):
        sources[block, : stop - start] = source[start:stop]
        targets[block, : stop - start] = row[start:stop] - first
        weights[block, : stop - start] = 1 / counts[row[start:stop]]
    return sources, targets, weights
