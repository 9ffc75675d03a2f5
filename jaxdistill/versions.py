"""What a run was made with."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from typing import Any

import jax


@functools.cache
def versions() -> dict[str, Any]:
    """Packages, git revision of the working directory, devices."""
    packages = ("jaxdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "git_revision": _git_revision(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def version(package: str) -> str:
    """A package's version, "not installed" for a directory on the path: code often comes to a pod as one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_revision() -> str | None:
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None  # no git here
    return git.stdout.strip() or None
