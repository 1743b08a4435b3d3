"""States of a run on object storage: the same bits come back, whatever is killed on the way."""

import multiprocessing
import os
import signal
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError, StorageError
from longlive_jax.files import folders, lease, remote
from longlive_jax.training.checkpoint import Checkpoints
from longlive_jax.training.plan import Plan
from longlive_jax.training.state import NetworkState, TrainState
from tests.storage import servers
from tests.storage.test_commands import here
from tests.training.tiny_run import equal

_PROCESSES = multiprocessing.get_context("forkserver")
PLAN = Plan("train", steps=10**6, save_every=1, keep_last=2)


def state(step: int, parameters: int = 7_000_000) -> TrainState:
    """Of a network of so many parameters, another one each step."""
    draw = np.random.default_rng(step)
    parts = draw.standard_normal((4, parameters // 4), np.float32)
    tree = {f"w{i}": jnp.asarray(part) for i, part in enumerate(parts)}
    network = NetworkState(tree, {"v": tree["w0"]}, jax.tree.map(lambda w: -w, tree))
    return TrainState(jnp.int32(step), {"model": network}, None, jnp.zeros((2,), jnp.int32))


def template(like: TrainState):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


def test_a_state_of_7_million_parameters_comes_back(server):
    root, newest = server.path("run7"), state(3)
    states = Checkpoints(root, PLAN)
    assert states.latest is None
    for step in (1, 2):
        states.save(step, state(step, 1000))
    states.save(3, newest)
    states.close()
    assert workdir.whole(root) == [2, 3]
    again = Checkpoints(root, PLAN)
    assert equal(again.restore(template(newest)), newest)
    again.close()


# A process that is killed.


def _start(target, *args):
    """A fork of the server of all tests, with the environment that names this test's servers."""
    process = _PROCESSES.Process(target=_begin, args=(here(), target, *args))
    process.start()
    return process


def _begin(enter, target, *args):
    enter()
    target(*args)


def _save_on_and_on(root: str, parameters: int, told) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    states = Checkpoints(remote.path(root), PLAN)
    step = states.latest or 0
    while True:
        step += 1
        now = state(step, parameters)
        told.send(step)
        states.save(step, now)
        states.wait()


def half_written(root):
    there = {int(p.name) for p in (root / workdir.STATES).glob("*") if p.name.isdecimal()}
    return there - set(workdir.whole(root))


def kill_while_it_saves(root, parameters, had, is_time):
    """Kills a process in its second save or later.

    Gives the newest whole step, which it checks, and whether a state was half written.
    """
    mine, its = _PROCESSES.Pipe()
    process = _start(_save_on_and_on, str(root), parameters, its)
    its.close()  # or a process that failed would be waited for
    while mine.recv() < had + 2:
        pass
    end = time.monotonic() + 60
    while not is_time() and time.monotonic() < end:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = bool(half_written(root))
    had, before = workdir.whole(root)[-1], had
    assert had > before
    states = Checkpoints(root, PLAN)
    assert states.latest == had
    assert equal(states.restore(template(state(0, parameters))), state(had, parameters))
    states.close()
    assert not half_written(root)
    return had, found


def test_killed_while_it_saves_the_older_state_stands(s3):
    root, had = s3.path("killed"), 0
    for _ in range(2):
        had, _ = kill_while_it_saves(root, 1_000_000, had, lambda: half_written(root))


@pytest.mark.slow
def test_killed_ten_times_while_it_saves_7_million_parameters(s3):
    root, had, unfinished, draw = s3.path("killed10"), 0, 0, np.random.default_rng(0)

    def is_time():  # some time after the first object of a state is there
        if half_written(root):
            time.sleep(draw.uniform(0, 0.2))
            return True
        return False

    for _ in range(10):
        had, found = kill_while_it_saves(root, 7_000_000, had, is_time)
        unfinished += found
    assert unfinished, "no kill met a state that was being written"


# One process at a time.


def _hold(folder: str, told, seconds: float) -> None:
    with lease.held(remote.RemotePath(folder), "taken"):
        told.send("held")
        time.sleep(seconds)


def test_a_folder_has_one_writer(s3, monkeypatch):
    monkeypatch.setattr(lease, "RENEWS", 0.2)
    root = s3.path("locked")
    with (
        folders.locked(root, "--workdir: another process trains in it"),
        pytest.raises(InputError, match=r"another process trains in it \(.*process \d+\)"),
        folders.locked(root, "--workdir: another process trains in it"),
    ):
        pass
    assert not (root / lease.FILE).exists()
    with folders.locked(root, ""):
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(s3):
    root = s3.path("lost")
    mine, its = _PROCESSES.Pipe()
    process = _start(_hold, str(root), its, 60)
    its.close()  # or a process that failed would be waited for
    mine.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (root / lease.FILE).exists()
    start = time.monotonic()
    with folders.locked(root, ""):
        assert time.monotonic() - start < 5


def test_the_lock_of_a_machine_that_is_gone_expires(s3, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES", 1.0)
    monkeypatch.setattr(lease, "_POLL", 0.1)
    root = s3.path("gone")
    (root / lease.FILE).write_text('{"host": "elsewhere", "process": 1, "token": "x"}')
    start = time.monotonic()
    with folders.locked(root, "taken"):
        assert time.monotonic() - start > 1.0


def test_a_lock_that_was_taken_over_is_left_alone(s3, monkeypatch):
    monkeypatch.setattr(lease, "RENEWS", 0.1)
    lock = s3.path("taken") / lease.FILE
    with folders.locked(lock.parent, "taken"):
        lock.write_text('{"host": "elsewhere", "process": 1, "token": "x"}')
        time.sleep(0.5)
        with pytest.raises(StorageError, match="another process has taken it over"):
            Checkpoints(lock.parent, PLAN).save(1, state(1, 1000))
    assert "elsewhere" in lock.read_text()


# Storage that is lost.


def test_a_state_that_is_half_there_is_none(s3):
    root = s3.path("half")
    states = Checkpoints(root, PLAN)
    for step in (1, 2):
        states.save(step, state(step, 1000))
    states.close()
    (root / workdir.STATES / "2/commit_success.txt").unlink()
    assert half_written(root) == {2}
    states = Checkpoints(root, PLAN)
    assert states.latest == 1 and workdir.whole(root) == [1]
    assert not half_written(root)
    states.save(2, state(2, 1000))
    states.close()
    assert workdir.whole(root) == [1, 2]
    for path in (root / workdir.STATES / "2/state/d").rglob("*"):
        path.unlink()
    with pytest.raises(InputError, match="is damaged"):
        Checkpoints(root, PLAN).restore(template(state(0, 1000)))


def test_a_server_that_dies_loses_no_word_about_it(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with servers.s3() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        remote._opened.cache_clear()
        states = Checkpoints(server.path("run"), PLAN)
        states.save(1, state(1, 1000))
        states.wait()
        server.stop()
        with pytest.raises(StorageError, match="does not answer"):
            states.save(2, state(2, 1000))
            states.wait()
        folder = states.rescue(2, state(2, 1000))
    remote._opened.cache_clear()
    local = Checkpoints(folder, PLAN)
    assert equal(local.restore(template(state(0, 1000))), state(2, 1000))
    local.close()
