"""`launch.bench kernels`, on a CPU."""

import json

import jax.numpy as jnp
import pytest

from launch.benchmarks import kernels
from tests.launch.commands import run


@pytest.mark.slow
def test_every_kernel_is_right():
    done = run("bench", "kernels", "--config=configs/tiny.py")
    figures = json.loads(done.stdout.splitlines()[-1])
    entries = {name: entry for name, entry in figures.items() if isinstance(entry, dict)}
    assert any(name.startswith("quantize_nvfp4") for name in entries)
    for name, entry in entries.items():
        assert entry["right"], name
        assert entry["ms"] > 0 and entry["xla_ms"] > 0, name
        assert f"{name}: right," in done.stdout


def test_calls_that_are_timed_together_are_all_made():
    x = jnp.ones((8, 8))
    text = kernels._several(jnp.matmul).lower([(x, x)] * 4).compile().as_text()
    assert text.count(" dot(") == 4
