"""Eight simulated devices for every test, set before any test touches a JAX backend."""

import importlib.metadata
import os

# Tests of tiny models spend their time compiling. Code that is not optimised is ready four times sooner; not split into
# parts, and with fusions by the older emitters where there still are some, in a third of that.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
older = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
if older:  # later ones stop at this flag, which they do not know
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += " --xla_force_host_platform_device_count=8"
    if "xla_backend_optimization_level" not in flags and not config.getoption("markexpr").startswith("real"):
        flags += f" {QUICK_TO_COMPILE}"
    os.environ["XLA_FLAGS"] = flags
