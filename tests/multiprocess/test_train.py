"""launch.train as real processes: killed, told to stop, spread over several, and started again."""

import json
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest

from tests.launch.commands import save_tiny
from tests.multiprocess.processes import Job, steps
from tests.training import tiny_run

pytestmark = pytest.mark.multiprocess
STEPS = 24
# As small as can be: what these tests are about is not the model.
SMALL = {k: v for k, v in tiny_run.BEFORE.items() if k.startswith("model")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_cached(tmp_path_factory.mktemp("data") / "cached")


def flags(data, root, **overrides):
    overrides = SMALL | dict(mesh__fsdp=2, mesh__seq=2, train__steps=STEPS) | overrides
    return tiny_run.flags(data, root / "run", **overrides)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of one process from start to end."""
    root = tmp_path_factory.mktemp("undisturbed")
    with Job(root / "0", flags(data, root)) as job:
        assert job.wait() == [0], job.text()
        assert f"step {STEPS} of {STEPS}: done: " in job.text()
    return root


def assert_same_samples_and_losses(root, other):
    for ours, theirs in zip(tiny_run.lines(root), tiny_run.lines(other), strict=True):
        assert ours["samples"] == theirs["samples"]
        # Sums in another order, and a few steps of Adam, which divides by small numbers.
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


def kill_and_resume(data, root, undisturbed, kills):
    """Kills a run where the draw falls, in a save or out of it, and lets the last start finish."""
    draw = random.Random(0)
    for number in range(kills):
        with Job(root / str(number), flags(data, root)) as job:
            goal = STEPS * (number + 1) // (kills + 1)
            job.wait_for(lambda goal=goal: steps(root / "run") >= goal)
            time.sleep(draw.uniform(0, 0.2))
            job.kill()
    with Job(root / "last", flags(data, root)) as job:
        assert job.wait() == [0], job.text()
        assert f"on from step {STEPS}" not in job.text()
    assert tiny_run.numbers(root / "run") == tiny_run.numbers(undisturbed / "run")


def test_killed_and_not_a_bit_differs(data, tmp_path, undisturbed):
    kill_and_resume(data, tmp_path, undisturbed, 1)


@pytest.mark.slow
def test_killed_ten_times_and_not_a_bit_differs(data, tmp_path, undisturbed):
    kill_and_resume(data, tmp_path, undisturbed, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT],
    ids=["TERM", "INT"],
)
def test_two_processes_are_told_to_stop_and_one_goes_on(data, tmp_path, undisturbed, number):
    run = tmp_path / "run"
    with Job(tmp_path / "two", flags(data, tmp_path, train__steps=10**6), 2, 2) as job:
        job.wait_for(lambda: steps(run) >= 3)
        job.signal(number, process=1)
        assert job.wait() == [0, 0], job.text()
        stopped = int(re.search(r"step (\d+) of 1000000: stopped by a signal", job.text(0))[1])
        assert "stopped" not in job.text(1)  # one process speaks for all
    assert steps(run) == stopped < STEPS
    with Job(tmp_path / "one", flags(data, tmp_path)) as job:
        assert job.wait() == [0], job.text()
        assert f"on from step {stopped} of {run}" in job.text()
    assert_same_samples_and_losses(run, undisturbed / "run")


@pytest.mark.slow
def test_four_processes_then_two_on_another_mesh(data, tmp_path, undisturbed):
    with Job(tmp_path / "four", flags(data, tmp_path, train__steps=9), 4, 1) as job:
        assert job.wait() == [0] * 4, job.text()
    mesh = dict(mesh__data=2, mesh__fsdp=1)
    with Job(tmp_path / "two", flags(data, tmp_path, **mesh), 2, 2) as job:
        assert job.wait() == [0] * 2, job.text()
        assert "on from step 9" in job.text(0)
    assert_same_samples_and_losses(tmp_path / "run", undisturbed / "run")


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_when_a_process_dies_the_other_names_it_and_ends(data, tmp_path, undisturbed, dead):
    with Job(tmp_path / "two", flags(data, tmp_path, train__steps=10**6), 2, 2) as job:
        job.wait_for(lambda: steps(tmp_path / "run") >= 3)
        job.signal(signal.SIGKILL, dead)
        codes = job.wait(120)
        assert codes[dead] == -signal.SIGKILL and codes[1 - dead] not in (0, None)
        named = "the leader" if dead == 0 else r"stopped sending heartbeats\):\n1\n"
        assert re.search(named, job.text(1 - dead)), job.text(1 - dead)
    with Job(tmp_path / "again", flags(data, tmp_path), 2, 2) as job:
        assert job.wait() == [0, 0], job.text()
    assert_same_samples_and_losses(tmp_path / "run", undisturbed / "run")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    from tests.training.tiny_videos import write_videos

    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.mark.slow
@pytest.mark.parametrize("encode", ["width", "halo"])
def test_two_processes_encode_and_evaluate_as_one_does(videos, tmp_path, encode):
    """`seq` crosses the processes: each decodes every video and encodes its share."""
    checkpoint = save_tiny(tmp_path / "ckpt")
    (tmp_path / "prompts.txt").write_text("a red boat\na cat\n")
    more = dict(
        mesh__seq=2, data__cached=False, data__encode=encode, train__steps=3, train__batch_size=2,
        train__accumulation=1, train__eval_every=3, train__eval_steps=2, train__eval_chunks=2,
        data__eval_path=tmp_path / "prompts.txt",
    )  # fmt: skip
    for name, processes in (("one", 1), ("two", 2)):
        words = tiny_run.flags(videos, tmp_path / name / "run", **more)
        words.append(f"--checkpoint={checkpoint}")
        with Job(tmp_path / name, words, processes, 2 // processes) as job:
            assert job.wait() == [0] * processes, job.text()
    assert_same_samples_and_losses(tmp_path / "two/run", tmp_path / "one/run")
    folders = [tmp_path / name / "run/evaluation/step-000003" for name in ("one", "two")]
    assert len({tuple(sorted(p.name for p in f.iterdir())) for f in folders}) == 1
    shutil.rmtree(tmp_path / "one")
    assert json.loads((tmp_path / "two/run/run.json").read_text())["checkpoint"] == str(checkpoint)
