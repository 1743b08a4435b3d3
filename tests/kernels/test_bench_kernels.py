"""`launch.bench kernels`, on a CPU."""

import json

import pytest

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
