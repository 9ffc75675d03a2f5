"""Eight simulated devices for every test, set before any test touches a JAX backend."""

import os


def pytest_configure(config):
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += " --xla_force_host_platform_device_count=8"
    if "xla_backend_optimization_level" not in flags and not config.getoption("markexpr").startswith("real"):
        # Tests of tiny models spend their time compiling: code that is not optimised is ready four times sooner.
        flags += " --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = flags
