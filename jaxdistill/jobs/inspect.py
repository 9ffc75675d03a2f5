"""What a model or a run on disk is, from its headers and records alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.checkpoint.model import describe, is_model
from jaxdistill.checkpoint.run import RunCheckpoints
from jaxdistill.formats.paths import any_path
from jaxdistill.models.families.family import axis_sizes
from jaxdistill.models.load import open_checkpoint
from jaxdistill.models.schema import count_parameters, param_axes, schema
from jaxdistill.partition import names
from jaxdistill.specs import FFN, Attention, LayerSpec, MixtureOfExperts, ModelConfig, PlainMLP
from jaxdistill.tokenizers import Tokenizer, TokenizerError, load_tokenizer

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"


def describe_path(path: str, *, tensors: bool = False) -> str:
    """A few aligned lines about a model or a run; with `tensors`, one more for each array."""
    place = any_path(path)
    if not place.exists():
        raise FileNotFoundError(f"{path}: there is no such file or directory.")
    if is_run(place):
        return _aligned(f"{path}: a run", _run_facts(place))
    kind, config, arrays = _arrays_of(path)
    size = sum(math.prod(shape) * itemsize for _, _, shape, _, itemsize in arrays)
    dtypes = Counter(dtype for _, _, _, dtype, _ in arrays)
    facts = [
        ("family", config.family),
        ("parameters", f"{count_parameters(config):,}"),
        *_layer_facts(config),
        ("embed", f"{config.embed:,}"),
        ("vocabulary", f"{config.vocab:,}, {'head tied to the embedding' if config.tied else 'head of its own'}"),
        ("context", f"{config.max_length:,} tokens"),
        ("arrays", f"{len(arrays)}, {size:,} bytes ({', '.join(f'{n} {d}' for d, n in dtypes.most_common())})"),
        ("on disk", f"{_disk_bytes(place):,} bytes"),
        *_tokenizer_facts(path),
    ]
    text = _aligned(f"{path}: {kind}", facts)
    return text + "\n" + _columns([row[:4] for row in arrays]) if tensors else text


def is_run(place: Path) -> bool:
    """Whether a directory is a run's, by what a run writes first."""
    return (place / METRICS).is_file() or (place / CHECKPOINTS).is_dir()


Array = tuple[str, str, tuple[int, ...], str, int]
"""A tensor's name, axes, shape, dtype, and the bytes of one number."""


def _arrays_of(path: str) -> tuple[str, ModelConfig, list[Array]]:
    if is_model(path):
        description = describe(path)
        axes = names(param_axes(description.config))
        arrays = []
        for name, leaf in description.leaves.items():
            itemsize = leaf.bytes // max(1, leaf.parameters)
            arrays.append((name, _axes(axes.get(name.replace("/", "."), ())), leaf.shape, leaf.dtype, itemsize))
        return "a jaxdistill checkpoint", description.config, arrays
    with open_checkpoint(path) as checkpoint:
        specs = schema(checkpoint.config)
        axes = {
            tensor.name: tuple(map(" x ".join, tensor.axes))
            for name, spec in specs.items()
            for tensor in checkpoint.stored(name).tensors(axis_sizes(spec.axes, spec.shape))
        }
        arrays = []
        for name in checkpoint.source.names():
            info = checkpoint.source.info(name)
            arrays.append((name, _axes(axes.get(name, ())), info.shape, str(info.dtype), info.dtype.itemsize))
        kind = "a Hugging Face directory" if any_path(path).is_dir() else "a GGUF file (sizes after dequantising)"
        return kind, checkpoint.config, arrays


def _axes(axes: Sequence[str | None]) -> str:
    return ", ".join(str(a) for a in axes) or "-"


def _layer_facts(config: ModelConfig) -> Iterable[tuple[str, str]]:
    yield "layers", f"{len(config.layers)}" + ("" if config.homogeneous else f" in {len(config.segments)} segments")
    start = 0
    for size, _ in config.segments:
        kinds = Counter(config.layers[start : start + size])
        for spec, count in kinds.items():
            title = "  each" if config.homogeneous else f"  {start}-{start + size - 1}"
            yield title if len(kinds) == 1 else f"{title}, {count} of them", _layer(spec)
        start += size


def _layer(spec: LayerSpec) -> str:
    return f"{_mixer(spec.mixer)}; {_ffn(spec.ffn)}"


def _mixer(mixer: Attention | None) -> str:
    if mixer is None:
        return "no attention"
    heads = f"{mixer.heads} heads of {mixer.head_dim}, {mixer.kv_heads} key-value heads"
    rope = "no rope" if mixer.rope is None else f"rope theta {mixer.rope.theta:g}"
    return f"attention {heads}, {rope}" + ("" if mixer.window is None else f", window {mixer.window:,}")


def _ffn(ffn: FFN | None) -> str:
    if ffn is None:
        return "no mlp"
    of_each = f"{ffn.experts_per_token} of {ffn.experts} experts, each " if isinstance(ffn, MixtureOfExperts) else ""
    gated = "" if isinstance(ffn, PlainMLP) else "gated "
    return f"{of_each}{ffn.activation} {gated}mlp {ffn.mlp:,}"


def _tokenizer_facts(path: str) -> Iterable[tuple[str, str]]:
    try:
        tokenizer: Tokenizer = load_tokenizer(path)
    except TokenizerError as error:
        yield "tokenizer", f"none ({error})"
        return
    by_id = {token: text for text, token in tokenizer.special.all.items()}

    def shown(token: int | None) -> str:
        return "none" if token is None else f"{token} {by_id.get(token, '')!r}"

    special = tokenizer.special
    yield "tokenizer", f"{type(tokenizer).__name__}, {tokenizer.vocab_size:,} ids"
    yield "  special", f"bos {shown(special.bos)}, eos {shown(special.eos)}, pad {shown(special.pad)}"
    yield "  stop", ", ".join(shown(token) for token in sorted(special.stop)) or "none"
    yield "  chat", "has a chat template" if tokenizer.chat_template else "no chat template"


def _run_facts(run: Path) -> Iterable[tuple[str, str]]:
    lines = list(metric_lines(run / METRICS))
    steps = [line for line in lines if "loss" in line]
    if steps:
        last = steps[-1]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        yield "last line", f"step {last['step']:,}, {last.get('tokens', 0):,} tokens, loss {loss}"
    for line in [line for line in lines if "held_out" in line][-1:]:
        yield "held out", f"step {line['step']:,}: " + _numbers(line["held_out"])
    if (run / CHECKPOINTS).is_dir():
        checkpoints = RunCheckpoints(run / CHECKPOINTS)
        try:
            saved, best = checkpoints.steps(), checkpoints.best()
            yield "checkpoints", ", ".join(f"step {step:,}" for step in saved) or "none"
            if best is not None:
                yield "best", f"step {best:,}: " + _numbers(checkpoints.info(best).get("held_out", {}))
        finally:
            checkpoints.close()
    found = [name for name in ("student", "report.html", "evaluation.json") if (run / name).exists()]
    yield "also here", ", ".join(found) or "nothing else"


def metric_lines(file: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a metrics file; a line that was torn when a run was killed is left out."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            yield found


def _numbers(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, int | float)) or "not measured"


def _disk_bytes(place: Path) -> int:
    return place.stat().st_size if place.is_file() else sum(f.stat().st_size for f in place.rglob("*") if f.is_file())


def _aligned(title: str, facts: Iterable[tuple[str, str]]) -> str:
    facts = list(facts)
    width = max(len(name) for name, _ in facts)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in facts)])


def _columns(rows: Sequence[tuple]) -> str:
    table = [("name", "axes", "shape", "dtype")] + [(n, a, "x".join(map(str, s)) or "-", d) for n, a, s, d in rows]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
