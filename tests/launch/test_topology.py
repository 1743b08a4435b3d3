"""Compiling for TPUs that are not here: what is refused. `make tpu` compiles."""

import pytest
from jax.experimental import topologies

from longlive_jax import topology
from longlive_jax.errors import InputError
from tests.launch.commands import run

TINY = "--config=configs/tiny.py"


@pytest.mark.parametrize(
    "command, words, says",
    [
        ("compile", (TINY,), "--cache"),
        ("compile", (TINY, "--cache=x", "--topology=v5e:2x2"), "--cache=x"),
        ("compile", (TINY, "--topology=v5e"), "--topology=v5e: must be KIND:AxB"),
        ("train", (TINY, "--topology=v5e:2x2"), "is for --dry_run"),
        ("train", (TINY, "--dry_run", "--topology=8"), "--topology=8: must be KIND:AxB"),
    ],
)
def test_bad_input(command, words, says):
    done = run(command, *words, check=False)
    assert done.code == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error", [RuntimeError("JAX TPU support not installed"), ImportError("No module named libtpu")]
)
def test_without_its_compiler(monkeypatch, error):
    """Both are what JAX says of it, by what else is installed."""

    def refuse(**_):
        raise error

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(InputError, match=r"compiler for TPUs is missing .*pip install libtpu"):
        topology.devices("v5e:2x2")
