"""The commands with addresses: what they write, what they refuse, what a lost storage leaves."""

import functools
import json
import os
import pathlib
import signal
import tempfile

import av
import numpy as np
import pytest
from absl import flags

from launch import command
from longlive_jax.checkpoints import store, workdir
from longlive_jax.data import records
from longlive_jax.data.manifest import PROGRESS
from longlive_jax.errors import InputError
from longlive_jax.files import remote
from tests.launch import commands
from tests.launch.commands import PROMPTS, TINY, save_tiny, write
from tests.multiprocess import processes
from tests.storage import servers
from tests.training import tiny_run
from tests.training.tiny_videos import write_videos

SMALL = {"train__steps": 4, "train__save_every": 2, "train__accumulation": 1}


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return tiny_run.write_cached(tmp_path_factory.mktemp("data") / "cached")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "ckpt")


def upload(folder: pathlib.Path, target: remote.RemotePath) -> remote.RemotePath:
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())
    return target


def download(source: remote.RemotePath, folder: pathlib.Path) -> pathlib.Path:
    for path in source.rglob("*"):
        target = folder / str(path).removeprefix(f"{source}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


# Commands are forks of a process that began with another environment than this test's.
_PASSED_ON = ("AWS_", "TENSORSTORE_", "LONGLIVE_", "TMPDIR")


def here() -> functools.partial:
    wanted = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
    return functools.partial(_enter, wanted)


def _enter(wanted):
    os.environ.update(wanted)
    tempfile.tempdir = None


def run(command, *words, **kwargs):
    return commands.run(command, *words, patch=here(), **kwargs)


def job(folder, flags):
    return processes.Job(folder, flags, devices=1, patch=here())


def refused(command, *words, code=2, **kwargs):
    done = run(command, *words, check=False, **kwargs)
    assert done.code == code, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    return last


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_run_and_its_data_are_elsewhere(kind, request, cached, tmp_path, monkeypatch):
    """Begun and gone on with, its folder and its data on object storage: the same numbers."""
    server = request.getfixturevalue(kind)
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    data, there, local = upload(cached, server.path("data")), server.path("run"), tmp_path / "local"
    run("train", *tiny_run.flags(cached, local, **SMALL))
    run("train", *tiny_run.flags(data, there, **SMALL | dict(train__steps=2)))
    assert workdir.whole(there) == [2]
    done = run("train", *tiny_run.flags(data, there, **SMALL))
    assert "on from step 2" in done.stdout and f"done: {there}" in done.stdout
    found = download(there, tmp_path / "found")
    assert tiny_run.numbers(found) == tiny_run.numbers(local)
    assert workdir.whole(there)[-1] == 4 and not (there / ".lock").exists()
    assert list((found / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_run_its_data_and_its_checkpoint_are_elsewhere(s3, cached, checkpoint, tmp_path):
    """Killed and started again, with all of it on s3: the same numbers as on a local disk."""
    data = upload(cached, s3.path("whole/data"))
    weights = upload(checkpoint, s3.path("whole/ckpt"))
    prompts = write(tmp_path / "prompts.txt", "\n".join(PROMPTS))
    values = SMALL | dict(
        data__eval_path=prompts, train__eval_every=4, train__eval_steps=1, train__eval_chunks=1
    )
    local, there = tmp_path / "local", s3.path("whole/run")
    run("train", *tiny_run.flags(cached, local, **values), f"--checkpoint={checkpoint}")
    flags = [*tiny_run.flags(data, there, **values), f"--checkpoint={weights}"]
    with job(tmp_path / "job", flags) as training:
        training.wait_for(lambda: workdir.whole(there))
        training.signal(signal.SIGKILL)
        training.processes[0].join()
    done = run("train", *flags)
    assert "on from step" in done.stdout and f"done: {there}" in done.stdout
    found = download(there, tmp_path / "found")
    assert tiny_run.numbers(found) == tiny_run.numbers(local)
    assert workdir.whole(there)[-1] == 4 and json.loads((found / "run.json").read_text())
    assert len(list((found / "evaluation/step-000004").glob("*.mp4"))) == 2
    assert workdir.read(there).checkpoint == str(weights)

    # From there to a checkpoint that stands alone, and to videos.
    made = s3.path("exported")
    run("export", "--config=configs/tiny.py", f"--checkpoint={there}", f"--output={made}")
    assert store.parts(str(made)) == ("dit", "vae", "umt5", "tokenizer")
    own = tmp_path / "exported"
    run("export", "--config=configs/tiny.py", f"--checkpoint={found}", f"--output={own}")
    for name in ("dit", "vae"):
        a, b = (list(store.Stored(str(where), name).pieces()) for where in (made, own))
        assert [(p.path, p.start) for p in a] == [(p.path, p.start) for p in b]
        assert all(np.array_equal(x.array, y.array) for x, y in zip(a, b))
    words = [*TINY, "--config.sample.chunks=1", "--config.sample.steps=1", f"--prompts={prompts}"]
    video = s3.path("videos/out.mp4")
    run("sample", *words, f"--checkpoint={made}", f"--output={video}")
    run("sample", *words, f"--checkpoint={own}", f"--output={tmp_path}/out.mp4")
    for number in ("000", "001"):
        file = tmp_path / f"out-{number}.mp4"
        assert s3.path(f"videos/out-{number}.mp4").read_bytes() == file.read_bytes()
        with av.open(str(file)) as opened:
            assert opened.streams.video[0].frames > 0


@pytest.mark.slow  # test_states.py has it within a process
def test_a_storage_that_is_lost_on_the_way(cached, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with servers.s3() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        remote._opened.cache_clear()
        there = server.path("run")
        flags = tiny_run.flags(cached, there, **SMALL | dict(train__steps=10**6))
        with job(tmp_path / "job", flags) as training:
            training.wait_for(lambda: workdir.whole(there))
            server.stop()
            assert training.wait() == [1], training.text()
        last = training.text().rstrip().splitlines()[-1]
        assert last.startswith(f"error: {there}") and "does not answer" in last, training.text()
        assert "Traceback" not in training.text()
    remote._opened.cache_clear()
    (rescued,) = (tmp_path / "tmp").glob("longlive_jax_rescued-*")
    assert f"--workdir={rescued}" in last
    step = workdir.whole(rescued)[-1]
    flags = tiny_run.flags(cached, rescued, **SMALL | dict(train__steps=step + 1))
    done = run("train", *flags)
    assert f"on from step {step}" in done.stdout
    assert len(tiny_run.lines(rescued)) == step + 1


# Of these one is seen to end a process, the others to be the error that does.
REFUSED = [
    ("--workdir=hdfs://name/run", "nothing serves hdfs://"),
    ("--workdir=gs:/bucket/run", "has one slash"),
    ("--workdir=s3://nobodys-bucket/run", "there is no bucket of this name"),
    ("--checkpoint=file:///ckpt", "nothing serves file://"),
    ("--config.data.path=hdfs://name/data", "nothing serves hdfs://"),
    ("--config.data.path=s3://nobodys-bucket/data", "there is no bucket of this name"),
    ("--config.data.eval_path=s3://bucket/prompts.txt", "is read from a local disk"),
]


@pytest.mark.parametrize("flag, words", REFUSED)
def test_addresses_are_refused_by_the_name_of_their_flag(s3, monkeypatch, flag, words):
    name, _, value = flag.removeprefix("--").partition("=")
    with pytest.raises(InputError) as error:
        if name.startswith("config."):
            setting = name.removeprefix("config.").replace(".", "__")
            command._check_paths(tiny_run.config(**{setting: value}))
        else:
            given = flags.FlagValues()
            flags.DEFINE_string(name, value, "", flag_values=given)
            given.mark_as_parsed()
            monkeypatch.setattr(command, "FLAGS", given)
            command._check_addresses(("workdir", "checkpoint"))
    assert words in str(error.value) and flag.partition("=")[0] in str(error.value)


def test_train_refuses_before_anything_starts(s3, cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flag, words = REFUSED[2]
    text = refused("train", *tiny_run.flags(cached, s3.path("no"))[:1], flag)
    assert words in text and "--workdir" in text, text
    assert list(tmp_path.iterdir()) == []


def test_other_flags_are_local(s3):
    text = refused("sample", *TINY, "--prompts=s3://bucket/p.txt", "--output=out.mp4")
    assert "--prompts=s3://bucket/p.txt: this command has it on a local disk" in text
    text = refused("make_tiny_world", "--output=gs://bucket/world")
    assert "--output=gs://bucket/world: this command has it on a local disk" in text
    text = refused("train", *tiny_run.flags("s3://bucket/videos", "x", data__cached=False))
    assert "encode videos with launch.encode_dataset" in text


@pytest.mark.slow
def test_a_read_only_bucket_is_refused_and_a_read_only_checkpoint_is_read(
    s3, cached, checkpoint, tmp_path, monkeypatch
):
    weights = upload(checkpoint, s3.path("read-only"))
    for key, value in servers.reader(s3, "guest").items():
        monkeypatch.setenv(key, value)
    words = [*TINY, "--config.sample.chunks=1", "--config.sample.steps=1"]
    prompts = write(tmp_path / "prompts.txt", PROMPTS[0])
    with servers.asking_for_permission(s3):
        text = refused("train", *tiny_run.flags(cached, s3.path("new")))
        assert "read-only for these credentials" in text
        done = run("sample", *words, f"--checkpoint={weights}", f"--prompts={prompts}",
                   f"--output={tmp_path}/out.mp4")  # fmt: skip
        assert "1 video" in done.stdout
        text = refused("sample", *words, f"--checkpoint={weights}", f"--prompts={prompts}",
                       f"--output={s3.path('out.mp4')}")  # fmt: skip
        assert "read-only for these credentials" in text


@pytest.mark.slow
def test_a_dataset_is_encoded_to_s3(s3, checkpoint, tmp_path):
    """Killed on the way and gone on with: the same files as on a local disk."""
    videos = write_videos(tmp_path / "videos")
    words = [f for f in tiny_run.flags(videos, "x", data__cached=False) if "workdir" not in f]
    words += [f"--checkpoint={checkpoint}", "--epochs=8"]
    local, there = tmp_path / "local", s3.path("encoded")
    run("encode_dataset", *words, f"--output={local}")
    patch = functools.partial(_die_after_a_file, here())
    done = commands.run("encode_dataset", *words, f"--output={there}", patch=patch, check=False)
    assert done.code == -signal.SIGKILL and (there / PROGRESS).is_file()
    assert "is unfinished" in refused("train", *tiny_run.flags(there, tmp_path / "no"))
    run("encode_dataset", *words, f"--output={there}")
    names = {p.name for p in local.iterdir()}
    assert {p.name for p in there.iterdir()} == names
    for name in names - {records.MANIFEST}:
        assert (there / name).read_bytes() == (local / name).read_bytes(), name
    run("train", *tiny_run.flags(there, tmp_path / "run", **SMALL))


def _die_after_a_file(enter):
    from longlive_jax.data.progress import Progress

    enter()
    real = Progress.add

    def add(self, line):
        real(self, line)
        os.kill(os.getpid(), signal.SIGKILL)

    Progress.add = add


# The data and the checkpoint, damaged.


def test_a_manifest_that_is_half_written(s3, cached):
    data = upload(cached, s3.path("half-data"))
    manifest = data / records.MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-40])
    text = refused("train", *tiny_run.flags(data, s3.path("new")))
    assert f"{manifest}: is damaged" in text
    manifest.unlink()
    text = refused("train", *tiny_run.flags(data, s3.path("new")))
    assert "holds no cached training data" in text
    assert not s3.path("new").exists()


@pytest.mark.slow
def test_a_checkpoint_that_is_half_there(s3, checkpoint, tmp_path):
    weights = upload(checkpoint, s3.path("half"))
    words = [*TINY, f"--prompts={write(tmp_path / 'p.txt', PROMPTS[0])}", f"--checkpoint={weights}",
             f"--output={tmp_path}/out.mp4"]  # fmt: skip
    group = next(p for p in (weights / "vae").iterdir() if p.name != "index.json")
    file = next(iter(group.rglob("*")))
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "is damaged" in refused("sample", *words)
    file.unlink()
    assert "is damaged" in refused("sample", *words)
    (weights / "metadata.json").unlink()
    assert "is no checkpoint" in refused("sample", *words)
