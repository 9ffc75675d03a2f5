"""Converting a checkpoint that is larger than the memory that the converter may have, both ways.

    python tools/bench_convert.py                  # 8 GB of bfloat16, 4 GB of memory: about five minutes
    python tools/bench_convert.py --gigabytes 1 --directory /mnt/disk

A synthetic Llama is written as a Hugging Face directory, copied (and made durable) for comparison, converted to ours
and back in processes of their own, and removed. Where memory cgroups can be made, each converter is in one that is half
as large as the checkpoint; its anonymous memory is sampled all the while. Quote the ratios of one run.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

from jaxdistill.checkpoint.parts import save_parts
from jaxdistill.jobs.convert import open_parts
from jaxdistill.models.export import write_hf_parts
from jaxdistill.models.schema import count_parameters, schema
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig

DTYPE = "bfloat16"
LAYER = LayerSpec(mixer=Attention(heads=32, kv_heads=8, head_dim=128), ffn=GatedMLP(mlp=14336))
CGROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
"""Where the two versions of memory cgroups are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured."""

    gigabytes: float = 8.0
    directory: Path | None = None
    """Where there is room for four times as much; None is the directory for temporary files."""


class Made:
    """Random parameters, of which each is made when it is read."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self._random = np.random.default_rng(0)

    def read(self, name: str, expert: int | None = None) -> np.ndarray:
        return self._random.standard_normal(schema(self.config)[name].shape, np.float32)


def main(bench: Bench) -> None:
    config = ModelConfig(family="llama", vocab=32000, embed=4096, layers=(LAYER,), tied=True)
    each = count_parameters(dataclasses.replace(config, layers=(LAYER,) * 2)) - count_parameters(config)
    depth = max(1, round((bench.gigabytes * 1e9 / 2 - count_parameters(config)) / each) + 1)
    config = dataclasses.replace(config, layers=(LAYER,) * depth)
    size = 2 * count_parameters(config)
    largest = 2 * max(int(np.prod(spec.shape)) for spec in schema(config).values())
    print(f"{size / 1e9:.2f} GB of {DTYPE}, {depth} layers, the largest tensor {largest / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory(dir=bench.directory) as folder:
        hf, ours, packed, again = (Path(folder) / name for name in ("hf", "ours", "packed", "again"))
        write_hf_parts(hf, Made(config), dtype=DTYPE)
        limit = size // 2
        floor = timed_copy(hf, Path(folder) / "copy")
        print(f"copy and fsync: {floor:.1f} s, {size / floor / 1e6:.0f} MB/s")
        for way, source, target in (
            ("to ours", hf, ours),
            ("to ours, compressed", hf, packed),
            ("back", ours, again),
        ):
            seconds, peak, limited = converted(way, source, target, limit)
            print(
                f"{way}: {seconds:.1f} s, {floor / seconds:.2f} of the copy's speed; anonymous memory up to "
                f"{peak / 1e6:.0f} MB (largest tensor + {(peak - largest) / 1e6:.0f} MB), "
                f"{f'in a cgroup of {limit / 1e9:.1f} GB' if limited else 'no cgroup could be made'}; "
                f"{sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e9:.2f} GB written"
            )
        equal = all((hf / f.name).read_bytes() == f.read_bytes() for f in again.glob("*.safetensors"))
        print("what came back is the same, bit for bit" if equal else "WHAT CAME BACK DIFFERS")


def timed_copy(source: Path, target: Path) -> float:
    drop(source)
    began = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def drop(folder: Path) -> None:
    """Takes files out of the page cache, so that everyone reads them from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def converted(way: str, source: Path, target: Path, limit: int) -> tuple[float, int, bool]:
    """(seconds, peak of anonymous memory, whether the limit held) of a conversion in a process of its own."""
    drop(source)
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--convert", way, str(source), str(target)])
    group = limited(process.pid, limit)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if group is not None:
        group.rmdir()
    if process.returncode:
        raise SystemExit(f"the conversion {way} failed with status {process.returncode}")
    return seconds, peak, group is not None


def limited(pid: int, limit: int) -> Path | None:
    """A memory cgroup for a process, or None where none can be made."""
    for root, name in zip(CGROUPS, ("memory.limit_in_bytes", "memory.max"), strict=True):
        group = root / f"jaxdistill-{pid}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(pid))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        return group
    return None


def anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def convert(way: str, source: str, target: str) -> None:
    with open_parts(source) as parts:
        if way == "back":
            write_hf_parts(target, parts, dtype=DTYPE, source="bench")
        else:
            save_parts(target, parts, dtype=DTYPE, source="bench", compress=way != "to ours")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(*sys.argv[2:])
    else:
        main(tyro.cli(Bench, description=__doc__))
