"""Several processes of one run, with everything on object storage."""

import pytest

from longlive_jax.checkpoints import workdir
from tests.multiprocess import processes
from tests.storage.test_commands import SMALL, download, here, run, upload
from tests.training import tiny_run


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_save_together_and_one_goes_on(s3, tmp_path):
    values = SMALL | dict(mesh__fsdp=2, mesh__seq=1, data__workers=1)
    cached = tiny_run.write_cached(tmp_path / "cached")
    data, there, local = upload(cached, s3.path("data2")), s3.path("run2"), tmp_path / "local"
    flags = tiny_run.flags(data, there, **values | dict(train__steps=2))
    with processes.Job(tmp_path / "job", flags, processes=2, devices=1, patch=here()) as job:
        assert job.wait() == [0, 0], job.text()
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
