"""Strict settings for every test: eight CPU devices, no silent rank promotion, a compile cache that
survives a run."""

import os
import pathlib
import signal

FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in FLAGS:
    FLAGS += " --xla_force_host_platform_device_count=8"
# tests compile far more than they run
QUICK = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SLOW = pathlib.Path(__file__).with_name("slow.txt")
"""Tests that take long for what they compile; made by `scripts/list_slow_tests.py`."""
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAXBD_DEVICES", "1"
)  # of the forced devices; tests that divide work among them say so
os.environ["XLA_FLAGS"] = FLAGS + QUICK

import jax  # noqa: E402
import pytest  # noqa: E402

from jaxbd import caching  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_configure(config):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as a shell has it for what runs in the background
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # or no program that tests start heeds Ctrl-C
    jax.devices()
    os.environ["XLA_FLAGS"] = (
        FLAGS  # read by now; programs that tests start shall run at full speed
    )


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are forgotten after each file of tests, with the factories that remember
    them.

    Else a worker ends with gigabytes of them, in more mappings of memory than a process may have:
    then XLA crashes.
    """
    yield
    caching.forget()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    listed = set(SLOW.read_text().splitlines())
    for item in items:
        if item.get_closest_marker("slow") or item.nodeid in listed:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
