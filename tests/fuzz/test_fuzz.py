"""The short form of fuzzing, and whether it would see a fault."""

import faulthandler
import os
import pathlib
import subprocess
import sys
import time

import pytest

from longlive_jax.errors import InputError
from tests.fuzz import mutate
from tests.fuzz import runner as runner_lib
from tests.fuzz.kind import Kind
from tests.fuzz.runner import Runner

ROOT = pathlib.Path(__file__).parents[2]


def test_mutated_files_are_read_or_refused():
    # In a process of its own: children are forked, and this one has threads of JAX.
    command = [sys.executable, "-m", "tests.fuzz", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _seeds(folder):
    (folder / "file").write_bytes(bytes(100))
    return [folder / "file"]


def _silent(path):
    return path.read_bytes()


def _raises(path):
    if any(path.read_bytes()):
        raise KeyError("a fault")


def _refuses(path):
    if any(path.read_bytes()):
        raise InputError("as it should be")


def _hangs(path):
    if any(path.read_bytes()):
        time.sleep(100)


def _eats(path):
    if any(path.read_bytes()):
        taken = bytearray(300 << 20)
        taken[::4096] = b"x" * len(taken[::4096])
        time.sleep(100)


def _aborts(path):
    if any(path.read_bytes()):
        faulthandler.disable()  # pytest's
        os.abort()


def _flip(draw, data):
    return bytes([draw.randint(1, 255)]) + data[1:]


READERS = {
    "ok": lambda path: None, "refused": _refuses, "traceback": _raises, "hang": _hangs,
    "memory": _eats, "abort": _aborts, "silent": _silent,
}  # fmt: skip


@pytest.mark.parametrize("what", READERS)
def test_a_fault_is_seen_and_the_next_file_is_read(tmp_path, monkeypatch, what):
    # What does not hang has time enough, however busy the machine is.
    monkeypatch.setattr(runner_lib, "SECONDS", 0.5 if what == "hang" else 60)
    monkeypatch.setattr(runner_lib, "MEMORY", 100 << 20)
    monkeypatch.setattr(mutate, "_BYTES", (_flip,))
    kind = Kind("kind", _seeds, READERS[what], silent=what == "silent")
    outcomes = Runner(kind, tmp_path / "work", 0, tmp_path / "kept").run(range(3))
    assert [o.number for o in outcomes] == [0, 1, 2]
    assert {o.what for o in outcomes} == {what}
    kept = sorted(p.name for p in (tmp_path / "kept").glob("*"))
    assert kept == ([] if what in ("ok", "refused") else ["kind-0", "kind-1", "kind-2"])


def test_a_mutation_is_a_function_of_its_number(tmp_path):
    kind = Kind("kind", _seeds, _silent)
    seeds, contents = kind.seeds(tmp_path), []
    for name in "ab":
        for number in range(20):
            (tmp_path / name / str(number)).mkdir(parents=True)
            path, _, _ = runner_lib.mutate(kind, seeds, 0, number, tmp_path / name / str(number))
            contents.append(path.read_bytes())
    assert contents[:20] == contents[20:] and len(set(contents)) > 10
