"""What a run of eight processes does when one dies, hangs, comes late or never, or storage fails.

In every case: the others end by themselves, in a stated time, with a line that names the process
and an exit code that says "start again" (docs/training_launch.md); the newest whole state stands;
the same command, with all processes or with fewer, gives the same samples and losses.
"""

import json
import random
import re
import signal
import time

import numpy as np
import pytest

from longlive_jax.checkpoints import workdir
from tests.multiprocess.processes import Job, steps
from tests.training import tiny_run

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
PROCESSES, STEPS = 8, 14
MESH = dict(mesh__data=2, mesh__fsdp=2, mesh__seq=2)
# Eight processes compile it on the same two cores.
SMALL = {k: v for k, v in tiny_run.BEFORE.items() if k.startswith("model")} | {
    "train__accumulation": 1
}
HEARTBEAT, JOIN, HANG, POLL = 15, 20, 20, 0.5  # seconds, for the tests
SLACK = 45  # eight processes on two cores, which others may use, too


def limits():
    """In a process of a run: shorter limits than those of use."""
    from longlive_jax import mesh
    from longlive_jax.training import watch

    mesh.HEARTBEAT_SECONDS, mesh.JOIN_SECONDS, watch.POLL_SECONDS = HEARTBEAT, JOIN, POLL
    mesh._ANSWER_SECONDS = 10


def hangs():
    """A process whose sixth batch never comes; it lives, and sends heartbeats."""
    from longlive_jax.training import prefetch

    limits()
    real, count = prefetch.Prefetcher.__next__, []

    def hang(self):
        count.append(1)
        if len(count) == 6:
            time.sleep(10**6)
        return real(self)

    prefetch.Prefetcher.__next__ = hang


def disk_is_full():
    """A process whose second state meets a full disk."""
    from longlive_jax.errors import InputError
    from longlive_jax.training.checkpoint import Checkpoints

    limits()
    real, count = Checkpoints.save, []

    def save(self, step, state):
        count.append(1)
        if len(count) == 2:
            raise InputError("no space for the state")
        return real(self, step, state)

    Checkpoints.save = save


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_cached(tmp_path_factory.mktemp("data") / "cached")


def flags(data, root, **overrides):
    overrides = MESH | SMALL | dict(train__steps=STEPS) | overrides
    return tiny_run.flags(data, root / "run", **overrides)


def job(data, root, name, processes=PROCESSES, **kwargs):
    steps_ = kwargs.pop("steps", STEPS)
    mesh = kwargs.pop("mesh", MESH)
    words = flags(
        data, root, train__steps=steps_, train__hang_seconds=kwargs.pop("hang", 600), **mesh
    )
    return Job(root / name, words, processes, 1, **{"patch": limits} | kwargs)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    with Job(root / "one", flags(data, root), 1, 8) as one:
        assert one.wait() == [0], one.text()
    return root / "run"


def assert_same(root, undisturbed):
    run = root / "run"
    for ours, theirs in zip(tiny_run.lines(run), tiny_run.lines(undisturbed), strict=True):
        assert ours["samples"] == theirs["samples"]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    goodput = [line["goodput"] for line in tiny_run.lines(run)]
    assert all(0 < share <= 1 for share in goodput)


def ends(job, dead=(), code=None, seconds=HEARTBEAT + SLACK):
    """Waits for all but the dead to end by themselves; their codes say "start again"."""
    start = time.monotonic()
    codes = job.wait(seconds)
    print(f"ended within {time.monotonic() - start:.1f} s: {codes}")
    for process, found in enumerate(codes):
        if process not in dead:
            assert found == code if code is not None else found in (1, -signal.SIGABRT), job.text()
    return codes


def goes_on(data, root, undisturbed, processes=PROCESSES, mesh=MESH):
    """The same command ends the run, from the newest whole state."""
    had = workdir.whole(root / "run")
    with job(data, root, "last", processes, mesh=mesh) as last:
        assert last.wait() == [0] * processes, last.text()
        if had:
            assert f"on from step {had[-1]} of" in last.text(0)
    assert_same(root, undisturbed)
    return had


def lasting(root):
    """Seconds of the run that its goodput is a share of."""
    return json.loads((root / "run/goodput.json").read_text())["wall"]


@pytest.mark.parametrize("dead, where", [(5, "step"), (5, "save"), (0, "step")])
def test_one_dies(data, tmp_path, undisturbed, dead, where):
    draw, start = random.Random(dead), time.monotonic()
    with job(data, tmp_path, "first", steps=10**6) as first:
        first.wait_for(lambda: steps(tmp_path / "run") >= 4)
        if where == "save":
            states = tmp_path / "run/checkpoints"
            first.wait_for(lambda: any(not p.name.isdecimal() for p in states.iterdir()))
        else:
            time.sleep(draw.uniform(0, 0.5))
        first.signal(signal.SIGKILL, dead)
        whole = workdir.whole(tmp_path / "run")[-1]
        ends(first, dead=[dead])
        for process in set(range(PROCESSES)) - {dead}:
            named = "the leader" if dead == 0 else rf"stopped sending heartbeats\):\n{dead}\n"
            assert re.search(named, first.text(process)), first.text(process)
    lost = steps(tmp_path / "run")
    assert workdir.whole(tmp_path / "run")[-1] >= whole
    had = goes_on(data, tmp_path, undisturbed)
    if lost > had[-1]:  # what was lost counts as time, and not as work
        assert tiny_run.lines(tmp_path / "run")[-1]["goodput"] < 0.9
    assert lasting(tmp_path) <= time.monotonic() - start


@pytest.mark.parametrize("stopped", [0, 3])
def test_one_is_stopped_and_comes_back(data, tmp_path, undisturbed, stopped):
    """SIGSTOP for longer than the limit: no heartbeats. It comes back when the others are gone."""
    with job(data, tmp_path, "first", steps=10**6) as first:
        first.wait_for(lambda: steps(tmp_path / "run") >= 4)
        first.signal(signal.SIGSTOP, stopped)
        others = [p for i, p in enumerate(first.processes) if i != stopped]
        end = time.monotonic() + HEARTBEAT + SLACK
        for process in others:
            process.join(max(0, end - time.monotonic()))
        assert all(p.exitcode in (1, -signal.SIGABRT) for p in others), first.text()
        named = (
            r"process 0 \(localhost:\d+\) has not answered"
            if stopped == 0
            else rf"heartbeats\):\n{stopped}\n"
        )
        assert re.search(named, first.text(7)), first.text(7)
        had = workdir.whole(tmp_path / "run")
        first.signal(signal.SIGCONT, stopped)
        ends(first)
        assert workdir.whole(tmp_path / "run") == had
    goes_on(data, tmp_path, undisturbed)


def test_one_hangs_and_lives(data, tmp_path, undisturbed):
    """Its main thread waits for ever, while JAX's threads send heartbeats."""
    with job(data, tmp_path, "first", own={6: hangs}, hang=HANG) as first:
        ends(first, code=1, seconds=240)
        for process in range(PROCESSES):
            assert re.search(
                r"error: 7 of 8 processes wait for process 6 \(.*\), in the stage 'reads the data "
                r"of step 6' for \d+ s\. All processes end",
                first.text(process),
            ), first.text(process)
        assert "in hang" in first.text(6)  # the line it hangs in
    had = goes_on(data, tmp_path, undisturbed)
    assert had == [2, 4]


def test_one_has_a_full_disk(data, tmp_path, undisturbed):
    with job(data, tmp_path, "first", own={2: disk_is_full}) as first:
        ends(first, code=2, seconds=240)
        for process in set(range(PROCESSES)) - {2}:
            assert re.search(
                r"error: process 2 \(.*\) failed: no space for the state\. All", first.text(process)
            ), first.text(process)
    assert goes_on(data, tmp_path, undisturbed) == [2]


def test_one_never_comes(data, tmp_path, undisturbed):
    with job(data, tmp_path, "first", late=[4]) as first:
        ends(first, seconds=JOIN + SLACK)
        for process in set(range(PROCESSES)) - {4}:
            assert "timed out task names:\n4\n" in first.text(process), first.text(process)
        # It comes when the others have gone.
        first.start(4)
        first.processes[4].join(JOIN + SLACK)
        assert first.processes[4].exitcode == -signal.SIGABRT, first.text(4)
        assert re.search(r"error: process 0 \(localhost:\d+\) does not answer", first.text(4))
    assert not (tmp_path / "run").exists()


def test_one_comes_late(data, tmp_path, undisturbed):
    with job(data, tmp_path, "first", late=[0]) as first:
        time.sleep(JOIN / 2)
        first.start(0)
        assert first.wait() == [0] * PROCESSES, first.text()
    assert_same(tmp_path, undisturbed)


def test_one_is_started_again_alone(data, tmp_path, undisturbed):
    """As by a cluster that restarts a pod and not its job."""
    with job(data, tmp_path, "first", steps=10**6) as first:
        first.wait_for(lambda: steps(tmp_path / "run") >= 4)
        first.signal(signal.SIGKILL, 5)
        first.processes[5].join()
        first.start(5)
        ends(first, seconds=HEARTBEAT + JOIN + SLACK)
    goes_on(data, tmp_path, undisturbed)


def test_on_with_half_of_the_processes(data, tmp_path, undisturbed):
    with job(data, tmp_path, "first", steps=10**6) as first:
        first.wait_for(lambda: steps(tmp_path / "run") >= 5)
        first.signal(signal.SIGKILL, 7)
        ends(first, dead=[7])
    goes_on(data, tmp_path, undisturbed, 4, dict(mesh__data=1, mesh__fsdp=4, mesh__seq=1))


def test_one_is_told_to_stop_and_all_save(data, tmp_path, undisturbed):
    with job(data, tmp_path, "first", steps=10**6) as first:
        first.wait_for(lambda: steps(tmp_path / "run") >= 3)
        first.signal(signal.SIGTERM, 6)
        assert first.wait() == [0] * PROCESSES, first.text()
    stopped = steps(tmp_path / "run")
    assert goes_on(data, tmp_path, undisturbed)[-1] == stopped
