"""Several processes of one run, with everything on object storage."""

import functools
import random
import re

import pytest

from longlive_jax.checkpoints import workdir
from tests.multiprocess import processes
from tests.multiprocess.test_failures import limits
from tests.storage import faults
from tests.storage.test_commands import SMALL, download, here, run, upload
from tests.training import tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
MESH = dict(mesh__data=2, mesh__fsdp=2, mesh__seq=2, data__workers=0)
STEPS = 8


def begin(enter):
    limits()
    enter()


def job(folder, flags, **kwargs):
    patch = functools.partial(begin, here())
    return processes.Job(folder, flags, **dict(processes=8, devices=1, patch=patch) | kwargs)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return tiny_run.write_cached(tmp_path_factory.mktemp("data") / "cached")


def assert_as_on_a_disk(cached, there, tmp_path):
    local = tmp_path / "local"
    run(
        "train",
        *tiny_run.flags(cached, local, **SMALL | MESH | dict(train__steps=STEPS)),
        devices=8,
    )
    ours, its = tiny_run.lines(download(there, tmp_path / "found")), tiny_run.lines(local)
    assert [x["samples"] for x in ours] == [x["samples"] for x in its]
    assert all(abs(x["loss"] - y["loss"]) < 1e-4 for x, y in zip(ours, its, strict=True))


def test_two_processes_save_together_and_one_goes_on(s3, cached, tmp_path):
    values = SMALL | dict(mesh__fsdp=2, mesh__seq=1, data__workers=1)
    data, there, local = upload(cached, s3.path("data2")), s3.path("run2"), tmp_path / "local"
    flags = tiny_run.flags(data, there, **values | dict(train__steps=2))
    with processes.Job(tmp_path / "job", flags, processes=2, devices=1, patch=here()) as two:
        assert two.wait() == [0, 0], two.text()
    assert workdir.whole(there) == [2]
    names = [str(path) for path in (there / "checkpoints/2").rglob("*")]
    assert any("ocdbt.process_1" in name for name in names)  # each wrote its part
    done = run("train", *tiny_run.flags(data, there, **values), devices=2)
    assert "on from step 2" in done.stdout
    commands = tiny_run.flags(cached, local, **values)
    run("train", *commands, devices=2)
    found = download(there, tmp_path / "found")
    ours, its = tiny_run.lines(found), tiny_run.lines(local)
    assert [x["samples"] for x in ours] == [x["samples"] for x in its]
    assert all(abs(x["loss"] - y["loss"]) < 1e-4 for x, y in zip(ours, its, strict=True))


def test_a_run_gets_through_bad_days(faulty, cached, tmp_path, monkeypatch):
    """Eight processes; of their requests every eighth is refused or lost, or never answered."""
    data, there, draw = upload(cached, faulty.path("data8")), faulty.path("run8"), random.Random(0)
    kinds = [faults.REFUSE, faults.LOSE, faults.LOSE_ANSWER] * 5 + [faults.STALL]
    faulty.fault = lambda *request: draw.choice(kinds) if draw.random() < 1 / 8 else None
    flags = tiny_run.flags(data, there, **SMALL | MESH | dict(train__steps=STEPS))
    monkeypatch.setenv("LONGLIVE_STORAGE_TRIES", "8")
    with job(tmp_path / "job", flags) as eight:
        assert eight.wait() == [0] * 8, eight.text()
    assert faulty.met > 20
    faulty.fault = lambda *request: None
    assert workdir.whole(there)[-1] == STEPS
    assert_as_on_a_disk(cached, there, tmp_path)


@pytest.mark.parametrize("kind", [faults.REFUSE, faults.STALL])
def test_a_storage_that_is_lost_ends_all_and_they_go_on(faulty, cached, tmp_path, kind):
    """From some save on, what one process writes is refused; or nothing is answered to any."""
    data, there = upload(cached, faulty.path(f"data-{kind}")), faulty.path(f"run-{kind}")

    def fault(method, path, number):
        del number
        own = "ocdbt.process_3/" in path if kind == faults.REFUSE else method == "PUT"
        return kind if own and "/checkpoints/4" in path else None

    faulty.fault = fault
    flags = tiny_run.flags(data, there, **SMALL | MESH | dict(train__steps=STEPS))
    with job(tmp_path / "job", flags) as eight:
        codes = eight.wait(300)
        assert codes == [1] * 8, eight.text()
        texts = [eight.text(process) for process in range(8)]
    named = [re.search(r"error: process (\d) \(.*\) failed: .*", text) for text in texts]
    assert sum(found is not None for found in named) >= 7, texts
    if kind == faults.REFUSE:
        assert {found[1] for found in named if found} == {"3"}, texts
    assert any("does not answer" in text for text in texts), texts
    assert faulty.met
    faulty.fault = lambda *request: None
    assert workdir.whole(there) == [2]
    with job(tmp_path / "again", flags) as again:
        assert again.wait() == [0] * 8, again.text()
        assert "on from step 2" in again.text(0)
    assert_as_on_a_disk(cached, there, tmp_path)
