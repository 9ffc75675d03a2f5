"""The chunked head: every term of an objective, a few positions at a time, so that [batch, length, vocab] never exists.

One scan walks the positions. For each chunk it forms the scores of student and teacher from hidden states and heads,
evaluates all terms, and pulls the gradient of Σ coefficientᵢ · totalᵢ back to the hidden states, the head and the
terms' own parameters at once. So the backward pass has nothing left to do but scale what the forward pass found:
nothing is recomputed, and memory grows with chunk x vocabulary. Where an objective is no sum over positions
(`term_values`), the backward pass forms the scores of each chunk once more.

Coefficients (weight ÷ count of supervised positions over the whole global step) are known before the scan, because
they depend on data only. On a mesh the scan runs under `shard_map`: heads are gathered once, before it, along the
axes that split tokens (under automatic sharding XLA gathers them again in every chunk); the vocabulary stays split
over the other axes, and `Scores` does the collectives of chunk size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.scores import Scores
from jaxdistill.losses.terms import Positions, Term
from jaxdistill.sharding import BATCH_AXES, Axes, Layout
from jaxdistill.types import Head, Mean, Outputs, Scalar, at_step

Totals = dict[str, Array]


class Weighted(Protocol):
    """Anything with a weight in the loss."""

    @property
    def weight(self) -> Scalar: ...


HEAD_AXES: Axes = ("vocab", "embed")
_OPTIONAL = ("masks", "one_to_one", "slopes", "normalizers", "known")
"""What may be given of each position besides hidden states, targets and mask: the last three on a second walk."""
BLOCK = 1024
"""Rows of the head whose gradient is added at once are a multiple of this: fewer make products too small to be fast."""


def evaluate_terms(
    terms: Mapping[str, Term],
    student: Outputs,
    teacher: Outputs | None,
    *,
    targets: Int[Array, "batch length"],
    loss_mask: Float[Array, "batch length"],
    coefficients: Mapping[str, Float[Array, ""]],
    parameters: Mapping[str, Mapping[str, Any]],
    step: Int[Array, ""],
    chunk: int,
    layout: Layout = Layout(),
    teacher_layout: Layout | None = None,
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """Σ coefficient · total over all terms, and each term's `Mean`, differentiable by the student and `parameters`.

    terms: by name. student, teacher: hidden states and heads; without a teacher, terms that ask for one get the
    student's own scores without gradient. loss_mask: a weight for each position; hidden states where it is 0 are
    never read, so anything may stand there. coefficients: a scalar for each term, see `term_coefficients`.
    parameters: by term name, for the terms that have some. chunk: positions scored at once on each device.
    layout, teacher_layout: where the two heads live; the teacher's default is the student's.
    """
    missing = sorted(set(terms) - set(coefficients))
    if missing:
        raise ValueError(f"no coefficient for the terms {missing}; give one for each of {sorted(terms)}.")
    plan = _plan(terms, student, teacher, chunk, layout, teacher_layout or layout)
    learned = {
        "hidden": student.hidden,
        "head": student.head,
        "parameters": {k: dict(v) for k, v in parameters.items()},
    }
    given = {
        "teacher": None if teacher is None else {"hidden": teacher.hidden, "head": teacher.head},
        "targets": targets,
        "mask": loss_mask,
        "coefficients": dict(coefficients),
        "step": step,
    }
    found: Any = _evaluate(plan, learned, jax.lax.stop_gradient(given))
    loss, totals = found
    count = loss_mask.sum()
    return loss, {name: Mean(total, count) for name, total in totals.items()}


def term_values(
    terms: Mapping[str, Term],
    student: Outputs,
    teacher: Outputs | None,
    *,
    targets: Int[Array, "batch length"],
    loss_mask: Float[Array, "batch length"],
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    step: Int[Array, ""] | int = 0,
    chunk: int,
    layout: Layout = Layout(),
    teacher_layout: Layout | None = None,
    masks: Mapping[str, Float[Array, "batch length"]] | None = None,
    one_to_one: Bool[Array, "batch length"] | None = None,
) -> dict[str, Float[Array, "batch length"]]:
    """Each term's value at each position times its mask: what is made of them is the caller's.

    Arguments as in `evaluate_terms`. Differentiable like it, for objectives that are no sum over positions: what each
    value counts for is known only when all are, so the backward pass walks the positions again. A term of weight 0 has
    no gradient.

    masks: of terms that have one of their own, 0 wherever `loss_mask` is. one_to_one: given where the teacher's hidden
    states are those of paired positions of another tokenization; see `Positions.one_to_one`. Then the teacher may have
    a vocabulary of its own.
    """
    plan = _plan(terms, student, teacher, chunk, layout, teacher_layout or layout, paired=one_to_one is not None)
    learned = {
        "hidden": student.hidden,
        "head": student.head,
        "parameters": {k: dict(v) for k, v in (parameters or {}).items()},
    }
    given = {
        "teacher": None if teacher is None else {"hidden": teacher.hidden, "head": teacher.head},
        "targets": targets,
        "mask": loss_mask,
        "coefficients": {},
        "step": jnp.asarray(step),
    }
    given |= {"masks": dict(masks)} if masks else {}
    given |= {} if one_to_one is None else {"one_to_one": one_to_one}
    return _values(plan, learned, jax.lax.stop_gradient(given))


def term_coefficients(
    terms: Mapping[str, Weighted], count: Float[Array, ""], step: Int[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """Each term's weight at this step ÷ the number of supervised positions of the whole global step (0 if none)."""
    share = jnp.where(count == 0, 0.0, 1.0 / jnp.where(count == 0, 1.0, count))
    return {name: jnp.float32(at_step(t.weight, step)) * share for name, t in terms.items()}


def default_chunk(vocab: int) -> int:
    """Positions to score at once on a device that holds `vocab` rows of the head: as many as cost at most 2²³ scores
    (32 MiB in float32), and 128 at the most, where a product no longer gains from more rows.

    Measured on CPUs (tools/bench_step.py). Every chunk reads and writes the gradient of the whole head, so a device
    with much arithmetic for its memory's speed wants more positions: the pod recipe scores 512."""
    return max(16, min(128, 2 ** int(math.log2(2**23 / vocab))))


@dataclasses.dataclass(frozen=True)
class _Places:
    """How the inputs are split over a mesh while the scan runs. mesh None: everything on one device."""

    mesh: jax.sharding.Mesh | None = None
    tokens: PartitionSpec = PartitionSpec()
    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    embed_axes: tuple[str, ...] = ()
    teacher_vocab_axes: tuple[str, ...] = ()
    teacher_embed_axes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What is fixed while tracing."""

    terms: dict[str, Term]
    chunk: int
    places: _Places


def _plan(
    terms: Mapping[str, Term],
    student: Outputs,
    teacher: Outputs | None,
    chunk: int,
    layout: Layout,
    teacher_layout: Layout,
    *,
    paired: bool = False,
) -> _Plan:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 position.")
    if teacher is not None and teacher.head.vocab != student.head.vocab and not paired:
        raise ValueError(
            f"the teacher scores {teacher.head.vocab} ids and the student {student.head.vocab}; terms on the same ids "
            "need equal vocabularies. Use a student with the teacher's tokenizer and vocabulary size."
        )
    return _Plan(terms=dict(terms), chunk=chunk, places=_places(layout, teacher_layout, student, teacher))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _places(layout: Layout, teacher_layout: Layout, student: Outputs, teacher: Outputs | None) -> _Places:
    if layout.mesh is None or layout.mesh.size == 1:
        return _Places()
    if teacher_layout.mesh != layout.mesh:
        raise ValueError("student and teacher must live on the same mesh; their sharding rules may differ.")
    tokens = layout.spec((*BATCH_AXES, None), student.hidden.shape)
    token_axes = tuple(name for entry in tokens for name in _names(entry))
    vocab, embed = layout.spec(HEAD_AXES, student.head.kernel.shape)
    # An axis that splits tokens cannot split the vocabulary too: every token needs all of it.
    vocab_axes = tuple(a for a in _names(vocab) if a not in token_axes)
    their_vocab, their_embed = vocab_axes, ()
    if teacher is not None:
        split, spread = map(_names, teacher_layout.spec(HEAD_AXES, teacher.head.kernel.shape))
        # Equal ids are compared shard by shard, so they are split alike; a vocabulary of its own as it divides.
        if teacher.head.vocab != student.head.vocab:
            their_vocab = tuple(a for a in split if a not in token_axes)
        their_embed = tuple(a for a in spread if a not in their_vocab)
    return _Places(
        mesh=layout.mesh,
        tokens=PartitionSpec(tokens[0], tokens[1]),
        token_axes=token_axes,
        vocab_axes=vocab_axes,
        embed_axes=tuple(a for a in _names(embed) if a not in vocab_axes),
        teacher_vocab_axes=their_vocab,
        teacher_embed_axes=their_embed,
    )


# The loss, with gradients found on the way forward.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _evaluate(plan: _Plan, learned: Any, given: Any) -> tuple[Array, Totals]:
    return _on_mesh(plan, _scan_values, learned, given)


def _evaluate_forward(plan, learned, given):
    (loss, totals), gradients = _on_mesh(plan, _scan_gradients, learned, given)
    return (loss, totals), gradients


def _evaluate_backward(plan, gradients, cotangents):
    scale, _ = cotangents  # totals are reported, not differentiated
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients), None


_evaluate.defvjp(_evaluate_forward, _evaluate_backward)


# Values, whose gradients are found on a second way.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _values(plan: _Plan, learned: Any, given: Any) -> Totals:
    return _values_forward(plan, learned, given)[0]


def _values_forward(plan, learned, given):
    found, normalizers = _on_mesh(plan, _scan_positions, learned, given)
    masks = dict.fromkeys(plan.terms, given["mask"]) | given.get("masks", {})
    values = {name: value * masks[name] for name, value in found.items()}
    return values, (learned, given | {"normalizers": normalizers, "known": found})


def _values_backward(plan, saved, slopes):
    learned, given = saved
    _, gradients = _on_mesh(plan, _scan_gradients, learned, given | {"slopes": slopes})
    return gradients, None


_values.defvjp(_values_forward, _values_backward)


def _on_mesh(plan: _Plan, scan: Callable, learned: Any, given: Any) -> Any:
    """Runs a scan under `shard_map` with every input in its place, or directly on one device."""
    run = functools.partial(scan, plan)
    places = plan.places
    if places.mesh is None:
        return run(learned, given)
    whole = PartitionSpec()

    def head_spec(head: Head, vocab_axes: tuple[str, ...], embed_axes: tuple[str, ...]) -> Head:
        kernel = PartitionSpec(vocab_axes or None, embed_axes or None)
        bias = None if head.bias is None else PartitionSpec(vocab_axes or None)
        return dataclasses.replace(head, kernel=kernel, bias=bias)

    learned_specs = {
        "hidden": places.tokens,
        "head": head_spec(learned["head"], places.vocab_axes, places.embed_axes),
        "parameters": jax.tree.map(lambda _: whole, learned["parameters"]),
    }
    teacher = given["teacher"] and {
        "hidden": places.tokens,
        "head": head_spec(given["teacher"]["head"], places.teacher_vocab_axes, places.teacher_embed_axes),
    }
    given_specs = {
        "teacher": teacher,
        "targets": places.tokens,
        "mask": places.tokens,
        "coefficients": whole,
        "step": whole,
    }
    given_specs |= {name: places.tokens for name in _OPTIONAL if name in given}
    values = (whole, dict.fromkeys(plan.terms, whole))
    out_specs = {
        _scan_values: values,
        _scan_gradients: (values, learned_specs),
        _scan_positions: (dict.fromkeys(plan.terms, places.tokens), places.tokens),
    }[scan]
    return jax.shard_map(run, mesh=places.mesh, in_specs=(learned_specs, given_specs), out_specs=out_specs)(
        learned, given
    )


def _scan_values(plan: _Plan, learned: Any, given: Any) -> tuple[Array, Totals]:
    chunks = _chunks(plan, learned["hidden"], given)
    head, parameters = _spread_head(plan, learned["head"], learned["hidden"].dtype), learned["parameters"]
    fixed = _fixed(plan, given)

    def body(sums, chunk):
        scores = _scores(head, chunk["hidden"], chunk["mask"], plan.places.vocab_axes)
        found = _chunk_value(plan, scores, parameters, chunk, fixed)
        return jax.tree.map(jnp.add, sums, found), None

    sums, _ = jax.lax.scan(body, _zero_sums(plan), chunks)
    return _over_tokens(plan, sums)


def _scan_positions(plan: _Plan, learned: Any, given: Any) -> tuple[Totals, Array]:
    """Values before their masks, and log Σ exp of the student's scores: what the second way need not find again."""
    hidden = learned["hidden"]
    head, fixed = _spread_head(plan, learned["head"], hidden.dtype), _fixed(plan, given)

    def body(_, chunk):
        scores = _scores(head, chunk["hidden"], chunk["mask"], plan.places.vocab_axes)
        normalizers = Scores(scores, plan.places.vocab_axes).log_normalizer()
        return None, (_chunk_values(plan, scores, learned["parameters"], chunk, fixed), normalizers)

    _, found = jax.lax.scan(body, None, _chunks(plan, hidden, given))
    rows, length = hidden.shape[:2]
    return jax.tree.map(lambda x: x.reshape(-1)[: rows * length].reshape(rows, length), found)


def _scan_gradients(plan: _Plan, learned: Any, given: Any) -> tuple[tuple[Array, Totals], Any]:
    if learned["head"].members is not None:
        raise ValueError("the mean of several models' probabilities has no gradient here; train one model at a time.")
    places, dtype = plan.places, learned["hidden"].dtype
    # `spread_*` bring what is learned to where the scan needs it; pulling back through them reduces the gradients of
    # all devices to where the parameters live, once, after the scan.
    hidden, hidden_back = jax.vjp(lambda h: _vary(h, places.vocab_axes), learned["hidden"])
    _, head_back = jax.vjp(functools.partial(_spread_head, plan, dtype=jnp.float32), learned["head"])
    parameters, parameters_back = jax.vjp(lambda p: _vary(p, places.token_axes), learned["parameters"])
    head = _spread_head(plan, learned["head"], dtype)
    fixed = _fixed(plan, given)

    def body(carry, chunk):
        sums, head_sum, parameters_sum = carry

        def value(products, bias, parameters):
            scores = _from_products(dataclasses.replace(head, bias=bias), products)
            loss, totals = _chunk_value(plan, scores, parameters, chunk, fixed)
            return loss, (loss, totals)

        hidden = _supervised(chunk["hidden"], chunk["mask"])
        loss, back, found = jax.vjp(value, _products(head, hidden), head.bias, parameters, has_aux=True)
        slope, bias_part, parameters_part = back(jnp.ones_like(loss))
        # Multiplied in the activations' type, as forwards: float32 operands would run at a fraction of the rate.
        slope = slope.astype(dtype)
        head_sum = dataclasses.replace(
            head_sum,
            kernel=_add_product(head_sum.kernel, slope, hidden),
            bias=jax.tree.map(jnp.add, head_sum.bias, bias_part),
        )
        sums = jax.tree.map(jnp.add, sums, found)
        parameters_sum = jax.tree.map(jnp.add, parameters_sum, parameters_part)
        return (sums, head_sum, parameters_sum), slope @ head.kernel

    start = (_zero_sums(plan), _zeros(head), _zeros(parameters))
    (sums, head_sum, parameters_sum), hidden_parts = jax.lax.scan(body, start, _chunks(plan, hidden, given))
    hidden_sum = hidden_parts.reshape(-1, hidden.shape[-1])[: hidden.shape[0] * hidden.shape[1]].reshape(hidden.shape)
    gradients = {
        "hidden": hidden_back(hidden_sum)[0],
        "head": head_back(head_sum)[0],
        "parameters": parameters_back(parameters_sum)[0],
    }
    return _over_tokens(plan, sums), gradients


# One chunk.


def _chunk_value(plan: _Plan, scores: Array, parameters: Any, chunk: Any, fixed: Any) -> tuple[Array, Any]:
    """What is differentiated, and the totals. Values have slopes of their own, or all of a term one coefficient."""
    loss = _zero_sums(plan)[0]
    masks = chunk.get("masks", {})
    found = _chunk_values(plan, scores, parameters, chunk, fixed)
    values = {name: value * masks.get(name, chunk["mask"]) for name, value in found.items()}
    totals = {name: value.sum() for name, value in values.items()}
    for name, term in plan.terms.items():
        if not callable(term.weight) and term.weight == 0:
            continue
        if "slopes" in chunk:
            loss = loss + (chunk["slopes"][name] * values[name]).sum()
        else:
            loss = loss + fixed["coefficients"][name] * totals[name]
    return loss, totals


def _chunk_values(plan: _Plan, scores: Array, parameters: Any, chunk: Any, fixed: Any) -> Totals:
    """Each term's value at each position of the chunk before its mask, 0 where that is 0. scores: the student's."""
    axes, their_axes = plan.places.vocab_axes, plan.places.teacher_vocab_axes
    mask = chunk["mask"]
    masks, by_mask = chunk.get("masks", {}), {}
    if fixed["teacher_head"] is None:
        teacher = Scores(jax.lax.stop_gradient(scores), axes)
    else:
        theirs = _scores(fixed["teacher_head"], chunk["teacher_hidden"], mask, their_axes)
        teacher = Scores(theirs, their_axes)
    at = Positions(targets=chunk["targets"], step=fixed["step"], one_to_one=chunk.get("one_to_one"))
    found, known = {}, chunk.get("known", {})
    for name, term in plan.terms.items():
        own = masks.get(name, mask)
        if id(own) not in by_mask:
            by_mask[id(own)] = Scores(_supervised_gradient(scores, own), axes, chunk.get("normalizers"))
        here = dataclasses.replace(at, known=known.get(name))
        values = term(by_mask[id(own)], teacher, here, parameters.get(name, {}))
        _check_values(name, values, own, (*axes, *their_axes))
        found[name] = jnp.where(own != 0, values.astype(jnp.float32), 0.0)
    return found


def _scores(head: Head, hidden: Array, mask: Array, axes: tuple[str, ...]) -> Float[Array, "position vocab_shard"]:
    """The scores of supervised positions, 0 before bias and cap where nothing is supervised."""
    hidden = _supervised(hidden, mask)
    if head.members is None:
        return _from_products(head, _products(head, hidden))
    ends = tuple(itertools.accumulate(head.members))
    log_probs = [
        Scores(_products(Head(head.kernel[:, end - width : end]), hidden[:, end - width : end]), axes).log_probs()
        for width, end in zip(head.members, ends, strict=True)
    ]
    return jax.nn.logsumexp(jnp.stack(log_probs), axis=0) - math.log(len(ends))


def _products(head: Head, hidden: Array) -> Float[Array, "position vocab_shard"]:
    """hidden @ kernelᵀ, summed in float32."""
    return jax.lax.dot_general(hidden, head.kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _from_products(head: Head, products: Array) -> Float[Array, "position vocab_shard"]:
    scores = products if head.bias is None else products + head.bias
    return scores if head.soft_cap is None else head.soft_cap * jnp.tanh(scores / head.soft_cap)


def _add_product(
    total: Float[Array, "vocab embed"], slope: Float[Array, "position vocab"], hidden: Float[Array, "position embed"]
) -> Float[Array, "vocab embed"]:
    """total + slopeᵀ @ hidden, in place: some rows of the vocabulary at a time, so that what is added needs no more
    memory than the slope does and never becomes a second array of the head's size."""
    vocab, embed = total.shape
    # Whole blocks of rows, so that no tile is cut in two and none is left with a few rows.
    rows = min(vocab, max(1, slope.size // embed // BLOCK) * BLOCK)

    def add(total: Array, start: Any, size: int) -> Array:
        columns = jax.lax.dynamic_slice_in_dim(slope, start, size, axis=1)
        part = jax.lax.dot_general(columns, hidden, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        block = jax.lax.dynamic_slice_in_dim(total, start, size) + part
        return jax.lax.dynamic_update_slice_in_dim(total, block, start, axis=0)

    whole = vocab // rows
    total = jax.lax.fori_loop(0, whole, lambda i, total: add(total, i * rows, rows), total)
    return add(total, whole * rows, vocab % rows) if vocab % rows else total


def _supervised(hidden: Array, mask: Array) -> Array:
    # Masking the input, not the result: 0 x inf would be NaN in the gradient.
    return jnp.where(mask[:, None] != 0, hidden, jnp.zeros((), hidden.dtype))


@jax.custom_vjp
def _supervised_gradient(scores: Float[Array, "position vocab_shard"], mask: Array) -> Array:
    """The scores themselves, whose gradient is 0 where nothing is supervised: there student and teacher score alike,
    and a term such as the root of a divergence has an infinite slope, of which 0 times would be NaN."""
    return scores


def _supervised_gradient_backward(mask, cotangent):
    return jnp.where(mask[:, None] != 0, cotangent, 0.0), None


_supervised_gradient.defvjp(lambda scores, mask: (scores, mask), _supervised_gradient_backward)


def _check_values(name: str, values: Array, mask: Array, vocab_axes: tuple[str, ...]) -> None:
    if values.shape != mask.shape:
        raise ValueError(
            f"the term {name!r} returned shape {values.shape} for {mask.shape[0]} positions; "
            "a term returns one value per position: reduce over the vocabulary with Scores.sum or Scores.expect."
        )
    partial = set(vocab_axes) & _varying(values)
    if partial:
        raise ValueError(
            f"the term {name!r} returned sums over one vocabulary shard (mesh axes {sorted(partial)}); "
            "reduce over the vocabulary with Scores.sum, Scores.expect or Scores.take, never with jnp.sum."
        )


# Bringing inputs to the scan, and results out of it.


def _chunks(plan: _Plan, hidden: Array, given: Any) -> dict[str, Array]:
    """Inputs as [chunks, chunk, ...] of this device's positions; the last chunk is filled with masked positions."""
    positions = hidden.shape[0] * hidden.shape[1]
    chunk = min(plan.chunk, positions)
    arrays = {"hidden": _vary(hidden, plan.places.vocab_axes), "targets": given["targets"], "mask": given["mask"]}
    arrays |= {name: given[name] for name in _OPTIONAL if name in given}
    if given["teacher"] is not None:
        arrays["teacher_hidden"] = _vary(given["teacher"]["hidden"], plan.places.teacher_vocab_axes)

    def split(x: Array) -> Array:
        x = x.reshape(positions, *x.shape[2:])
        x = jnp.pad(x, [(0, -positions % chunk)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    return jax.tree.map(split, arrays)


def _fixed(plan: _Plan, given: Any) -> dict[str, Any]:
    teacher = given["teacher"]
    head = None
    if teacher is not None:
        places = dataclasses.replace(plan.places, embed_axes=plan.places.teacher_embed_axes)
        head = _spread_head(dataclasses.replace(plan, places=places), teacher["head"], teacher["hidden"].dtype)
    return {"teacher_head": head, "coefficients": given["coefficients"], "step": given["step"]}


def _spread_head(plan: _Plan, head: Head, dtype: Any) -> Head:
    """This device's vocabulary rows in full width, in the type that is multiplied."""
    places = plan.places
    kernel = head.kernel.astype(dtype)
    # Along axes that split tokens each device finds a gradient of its own (the transpose sums them and scatters);
    # along others all find the same one.
    for axis in reversed(places.embed_axes):
        to = "varying" if axis in places.token_axes else "invarying"
        kernel = jax.lax.all_gather(kernel, axis, axis=1, tiled=True, to=to)
    bias = None if head.bias is None else head.bias.astype(jnp.float32)  # added to scores, which are float32
    return _vary(dataclasses.replace(head, kernel=kernel, bias=bias), places.token_axes)


def _vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """Marks values as different on each device along `axes`, so that gradients along them stay apart until the end."""

    def vary(x: Array) -> Array:
        missing = tuple(a for a in axes if a not in _varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _varying(x: Array) -> frozenset[str]:
    """The mesh axes along which devices hold different values, as `shard_map` tracks them."""
    return jax.typeof(x).mat.varying


def _zeros(tree: Any) -> Any:
    """Float32 zeros, varying as the given arrays do."""
    return jax.tree.map(lambda x: _vary(jnp.zeros(x.shape, jnp.float32), tuple(_varying(x))), tree)


def _zero_sums(plan: _Plan) -> tuple[Array, Totals]:
    zero = _vary(jnp.float32(0), plan.places.token_axes)
    totals: Any = dict.fromkeys(plan.terms, zero)
    return zero, totals


def _over_tokens(plan: _Plan, sums: tuple[Array, Totals]) -> tuple[Array, Totals]:
    axes = plan.places.token_axes
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), sums) if axes else sums
