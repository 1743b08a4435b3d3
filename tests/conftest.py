"""Tests run on 8 fake CPU devices, with JAX's strictest promotion rules."""

import gc
import os
import pathlib
import signal

# A shell starts what runs in its background with SIGINT ignored, and commands that tests start and
# interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests of tests/gpu run on the machine's own devices; all others on fake CPU devices.
ON_GPU = os.environ.get("LONGLIVE_TEST_PLATFORM") == "gpu"
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # A test compiles for longer than it runs: code that LLVM does not optimise is there in a
    # quarter of the time.
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = flags.strip()

import time

import jax
import numpy as np
import pytest
from jax._src import cache_key, compiler

if not ON_GPU:
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Programs that are traced are millions of objects: to look through them as often as Python does by
# default took a twentieth of all time.
gc.set_threshold(50_000, 20, 20)


def _compile_once():
    """What took a tenth of a second to compile is kept: tests trace equal programs anew.

    Not JAX's cache on disk, for which programs are made into bytes; see `compilation_cache`.
    """
    real, kept = compiler.backend_compile_and_load, {}

    def once(backend, module, devices, options, host_callbacks):
        if host_callbacks:
            return real(backend, module, devices, options, host_callbacks)
        key = cache_key.get(module, np.array(list(devices)), options, backend)
        if key in kept:
            return kept[key]
        start = time.monotonic()
        program = real(backend, module, devices, options, host_callbacks)
        if time.monotonic() - start > 0.1:
            kept[key] = program
        return program

    compiler.backend_compile_and_load = once


# Private: with another JAX, equal programs are compiled anew.
if not ON_GPU and hasattr(compiler, "backend_compile_and_load"):
    _compile_once()

TESTS = pathlib.Path(__file__).parent
# Folders whose files take longest. A worker takes a file at a time, in order: a long one taken last
# would be all that runs.
LONGEST = (
    "multiprocess", "training", "launch", "storage", "sampling", "kernels", "examples", "checkpoints", "models",
    "quant", "ops", "formats", "serving", "fuzz", "grading",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item):
        folder = item.path.relative_to(TESTS).parts[0]
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Equal programs of different tests and of the commands they start are compiled once."""
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if directory is None:
        # One for all processes: each has its own folder below that of the whole run.
        parent = tmp_path_factory.getbasetemp()
        parent = parent.parent if "PYTEST_XDIST_WORKER" in os.environ else parent
        directory = os.environ["JAX_COMPILATION_CACHE_DIR"] = str(parent / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", directory)
    # What commands compile, they keep (tests.launch.commands). Here hardly anything: XLA has died of a
    # segmentation fault while it made a CPU program's bytes, in two of some ten runs of all tests
    # (jax 0.12.0), and xdist does not survive a worker.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
