"""Compiling for TPUs that are not here: what is refused. `make tpu` compiles."""

import importlib.util

import pytest

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


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_its_compiler():
    done = run("compile", TINY, "--topology=v5e:2x2", check=False)
    assert done.code == 2 and "pip install libtpu" in done.stderr
