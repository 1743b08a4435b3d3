"""Who keeps the others waiting, told from where each process is; and how all learn it."""

import threading
import time

import jax
import pytest

from longlive_jax.errors import InputError
from longlive_jax.training import watch
from longlive_jax.training.watch import Stage

# A thread that stands for a process ends by SystemExit.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def stages(*numbers, seconds=100.0, bounded=True, **others):
    """Processes that have been in these stages for so long; others, as p3=: of that one."""
    found = {
        p: Stage(n, f"takes step {n}", seconds, bounded, f"host{p}") for p, n in enumerate(numbers)
    }
    return found | {int(p[1:]): stage for p, stage in others.items()}


def test_the_one_that_is_behind_is_named():
    cause = watch.late(stages(7, 7, 6, 7), 60)
    assert cause is not None and cause.processes == (2,) and cause.code == 1
    assert cause.line == (
        "3 of 4 processes wait for process 2 (host2), in the stage 'takes step 6' for 100 s"
    )
    cause = watch.late(stages(*[1] * 20, 2), 60)
    assert cause is not None and "process 0 (host0), 1 (host1)" in cause.line
    assert "and 12 more, in the stage" in cause.line and len(cause.processes) == 20


def test_nobody_is_named_too_early():
    assert watch.late(stages(7, 7, 6, 7, seconds=59), 60) is None
    # It has just begun what the others wait for, or they have just come.
    assert watch.late(stages(7, 7, p2=Stage(6, "reads", 1, True)), 60) is None
    assert watch.late(stages(6, 6, seconds=1000, p2=Stage(7, "saves", 30, True)), 60) is None
    # An evaluation of hours, that all are in.
    assert watch.late(stages(6, 6, seconds=9999, bounded=False), 60) is None


def test_a_step_that_no_process_ends_names_the_network():
    cause = watch.late(stages(6, 6), 60)
    assert cause is not None and cause.processes == ()
    assert "all 2 processes have been in the stage 'takes step 6' for 100 s" in cause.line
    assert "the network between them" in cause.line


class Store:
    """JAX's key-value store, as its client has it."""

    def __init__(self):
        self.found = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.found and not allow_overwrite:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.found[key] = value

    def key_value_try_get(self, key):
        if key not in self.found:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.found[key]

    def key_value_dir_get(self, key):
        return [(k, v) for k, v in self.found.items() if k.startswith(key)]


@pytest.fixture
def ends(monkeypatch):
    """The codes that processes end with; each is a thread here, which ends."""
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(watch.os, "_exit", leave)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.02)
    return codes


def begin(store, processes, limit=0.3):
    return [watch._Watch(store, p, processes, limit) for p in range(processes)]


def until(found):
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("late", [0, 2])
def test_one_that_gets_no_further_ends_all(ends, capfd, late):
    watches = begin(Store(), 3)
    for step in range(3):
        for process, one in enumerate(watches):
            if process != late or step == 0:
                one.at(f"takes step {step}", True)
    until(lambda: len(ends) == 3)
    assert ends == [1] * 3
    printed = capfd.readouterr().err
    assert printed.count(f"error: 2 of 3 processes wait for process {late} (") == 3
    assert "in the stage 'takes step 0'" in printed and "goes on from the last save" in printed
    assert "most recent call first" in printed  # the late one shows where it hangs
    for one in watches:
        one.stop()


def test_one_that_does_not_even_say_where_it_is_ends_all(ends, capfd):
    """Its watch is as dead as the rest of it, and JAX's heartbeats are not."""
    store = Store()
    watches = begin(store, 2)
    watches[1].stop()
    for step in range(2):
        watches[0].at(f"takes step {step}", True)
    until(lambda: ends == [1])
    assert "1 of 2 processes wait for process 1" in capfd.readouterr().err
    watches[0].stop()


def test_the_one_with_the_store_is_named_when_it_is_silent(ends, capfd, monkeypatch):
    monkeypatch.setattr(watch.mesh_lib, "HEARTBEAT_SECONDS", 0.2)
    store, released, printed = Store(), threading.Event(), []
    store.key_value_set = lambda *args, **kwargs: released.wait()
    (one,) = [watch._Watch(store, 1, 2, 60)]
    until(lambda: printed.append(capfd.readouterr().err) or "process 0 (" in "".join(printed))
    assert "has not answered for 0 s" in "".join(printed) and not ends
    released.set()
    one.stop()


@pytest.mark.parametrize("process", [0, 1])
def test_an_error_of_one_is_told_to_all_with_its_code(ends, capfd, process):
    watches = begin(Store(), 3, 60)
    watches[process].at("saves after step 4", False)
    watches[process].fail(InputError("the disk is full\nand more"), 2)
    until(lambda: len(ends) == 2)
    printed = capfd.readouterr().err
    assert ends == [2, 2] and printed.count("failed: the disk is full. All processes end") == 2
    assert printed.count(f"process {process} (") == 2
    for one in watches:
        one.stop()


def test_what_another_may_have_caused_is_told_last(ends, capfd, monkeypatch):
    """A collective fails everywhere when one process ends by an error of its own."""
    monkeypatch.setattr(watch.mesh_lib, "HEARTBEAT_SECONDS", 1.0)
    watches = begin(Store(), 3, 60)
    error = jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer")
    failing = threading.Thread(target=watches[0].fail, args=(error, 1), daemon=True)
    failing.start()
    time.sleep(0.1)
    watches[1].fail(InputError("no space"), 2)
    until(lambda: len(ends) == 2)
    printed = capfd.readouterr().err
    assert ends == [2, 2] and printed.count("process 1 (") == 2
    assert "process 0: Gloo all-reduce failed: Connection closed by peer; waits to learn" in printed
    for one in watches:
        one.stop()


def test_memory_that_is_used_up_is_an_error_of_its_own():
    ours = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert watch._by_others(ValueError("UNKNOWN: Gloo AllGather failed: Read error"))
    theirs = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
    assert not watch._by_others(ours) and watch._by_others(theirs)
    wrapped = ValueError("save failed")
    wrapped.__cause__ = theirs
    assert watch._by_others(wrapped) and not watch._by_others(InputError("x"))


def test_a_process_that_is_alone_is_not_watched():
    threads = threading.active_count()
    with watch.watched(1, lambda error: 1):
        watch.at("takes step 1")
        assert threading.active_count() == threads
