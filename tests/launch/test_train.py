"""The command: what it writes, what it refuses, and how it ends."""

import functools
import json
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax.checkpoints import store, workdir
from longlive_jax.models import dit
from tests.launch.commands import PROMPTS, run, write
from tests.multiprocess.processes import Job, steps
from tests.training import tiny_run
from tests.training.tiny_videos import write_videos

MESH = dict(mesh__fsdp=2, mesh__seq=2)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return tiny_run.write_cached(tmp_path_factory.mktemp("data") / "cached")


def train(flags, *more, **kwargs):
    return run("train", *flags, *more, devices=4, **kwargs)


def refused(flags, *more, code=2, **kwargs):
    """What it says of bad input: last, and with no traceback of its own."""
    done = train(flags, *more, check=False, **kwargs)
    assert done.code == code, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    return last


# From videos to videos.


@pytest.fixture(scope="module")
def online(tmp_path_factory, checkpoint):
    """A run that encodes its videos itself, from weights of a checkpoint, and evaluates."""
    root = tmp_path_factory.mktemp("online")
    videos = write_videos(root / "videos")
    prompts = write(root / "prompts.txt", "\n".join([*PROMPTS, "a dog"]))
    values = dict(
        data__cached=False, data__eval_path=prompts, train__steps=3, train__eval_every=3,
        train__eval_steps=2, train__eval_chunks=1, **MESH,
    )  # fmt: skip
    flags = tiny_run.flags(videos, root / "run", **values)
    return root, flags, train(flags, f"--checkpoint={checkpoint}")


def test_trains_on_videos_and_evaluates(online):
    root, _, done = online
    lines = tiny_run.lines(root / "run")
    assert len(lines) == 3 and all(np.isfinite(line["loss"]) for line in lines)
    assert {name for line in lines for name in line["samples"]} == {"v0", "v1", "v2"}
    assert "begin at random" not in done.stdout
    folder = root / "run" / "evaluation" / "step-000003"
    names = [f"prompts-00{i}.{suffix}" for i in (1, 2, 3) for suffix in ("mp4", "png")]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert f"evaluation: {folder}" in done.stdout


@pytest.mark.slow
def test_samples_from_the_run(online, tmp_path):
    """The averages by default; the VAE and text encoder come from the run's checkpoint."""
    root, _, _ = online
    words = [f for f in tiny_run.flags("x", "y") if "config" in f and "data" not in f]
    call = [
        *words, f"--prompts={root}/prompts.txt", "--config.sample.chunks=1",
        "--config.sample.steps=2",
    ]  # fmt: skip
    found = {}
    for name, more in {
        "average": [f"--checkpoint={root}/run", f"--output={tmp_path}/a.mp4"],
        "latest": [f"--checkpoint={root}/run", "--weights=latest"],
    }.items():
        run("sample", *call, *more, f"--save_latents={tmp_path}/{name}.npz")
        found[name] = np.load(tmp_path / f"{name}-000.npz")["latents"]
    assert (tmp_path / "a-002.mp4").stat().st_size
    assert not np.array_equal(found["average"], found["latest"])
    done = run("sample", *call, f"--checkpoint={root}/run", "--config.model.num_heads=4",
               f"--output={tmp_path}/b.mp4", check=False)  # fmt: skip
    assert done.code == 2 and "num_heads is 4 by the config, 8 in the run" in done.stderr


@pytest.mark.slow
def test_samples_from_a_run_made_before(checkpoint, tmp_path):
    """Its state is of the first version; see tests/training/test_loop.py."""
    root = shutil.copytree(tiny_run.RUN_BEFORE, tmp_path / "run")
    settings = json.loads((root / "run.json").read_text()) | {"checkpoint": str(checkpoint)}
    (root / "run.json").write_text(json.dumps(settings))
    prompts = write(tmp_path / "prompts.txt", PROMPTS[0])
    words = [
        f for f in tiny_run.flags("x", "y", **tiny_run.BEFORE) if "config" in f and "data" not in f
    ]
    run(
        "sample", *words, f"--prompts={prompts}", "--config.sample.chunks=1",
        "--config.sample.steps=2", f"--checkpoint={root}", f"--output={tmp_path}/out.mp4",
    )  # fmt: skip
    assert (tmp_path / "out.mp4").stat().st_size


@pytest.mark.slow
def test_a_run_begins_with_the_averages_of_another(online, cached, checkpoint, tmp_path):
    flags = tiny_run.flags(cached, tmp_path / "run", train__steps=1, **MESH)
    done = train(flags, f"--checkpoint={online[0] / 'run'}")
    assert "begin at random" not in done.stdout
    assert workdir.parts(tmp_path / "run") == str(checkpoint)


def test_begins_with_the_checkpoints_weights(online, checkpoint):
    """Few and small steps lead from them to the run's."""
    cfg = tiny_run.config()
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "seq"), devices=jax.devices()[:1])
    spec = dit.spec(cfg.model)
    before = store.load(checkpoint, "dit", spec)
    after = workdir.State(online[0] / "run").load("dit", spec, mesh, "float32", {}, "latest")
    biggest = jax.tree.map(
        lambda x, y: float(abs(np.asarray(x) - np.asarray(y)).max()), before, after
    )
    assert 0 < max(jax.tree.leaves(biggest)) < 0.5


# Before anything runs.


def test_a_dry_run_reads_and_writes_nothing(tmp_path):
    done = train(tiny_run.flags("/nowhere", tmp_path / "run", **MESH), "--dry_run")
    assert not (tmp_path / "run").exists()
    lines = done.stdout.splitlines()
    assert lines[0].endswith(" parameters on 4 devices: data=1, fsdp=2, seq=2")
    for words in (
        "  arguments ",
        "  temporaries ",
        "  output ",
        "  optimiser ",
        "  moving average ",
    ):
        (line,) = [line for line in lines if line.startswith(words)]
        assert float(line.split()[-1]) > 0
    (line,) = [line for line in lines if "self_attn/qkv/weight" in line]
    assert "2x64x192" in line and "-, fsdp+seq, -" in line


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(mesh__seq=8), "mesh.seq=8"),
        (dict(mesh__seq=2, mesh__fsdp=4), "needs 8 devices, 4 found"),
        (dict(train__batch_size=3), "train.batch_size=3 must be a multiple of"),
        (dict(data__path="/nowhere"), "/nowhere: no such folder"),
        (dict(data__cached=False, data__path="/nowhere"), "data.path='/nowhere' must be a folder"),
        (dict(train__eval_every=1), "needs data.eval_path"),
        (dict(train__text_encoder=True), "encoded with train.text_encoder"),
        (dict(train__latent_frames=8), "holds 4 latent frames a sample"),
        (dict(workdir=""), "--workdir is missing"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_made(cached, tmp_path, overrides, words):
    values = MESH | overrides
    workdir = values.pop("workdir", tmp_path / "run")
    path = values.pop("data__path", cached)
    if "train__text_encoder" in values:
        words = "--checkpoint is missing"
    text = refused(tiny_run.flags(path, workdir, **values))
    assert text.startswith("error: ") and words in text, text
    assert not (tmp_path / "run").exists()


def test_what_the_checkpoint_lacks_is_named(cached, tmp_path, checkpoint):
    flags = tiny_run.flags(write_videos(tmp_path / "videos"), tmp_path / "run", data__cached=False)
    assert "--checkpoint is missing" in refused(flags)
    wide = "--config.model.ffn_dim=256"
    text = refused([*flags, wide], f"--checkpoint={checkpoint}")
    assert "its dit has other sizes than the config" in text
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_made_inside_the_checkpoint(cached, checkpoint):
    flags = tiny_run.flags(cached, checkpoint / "run")
    assert "which is read; give an output" in refused(flags, f"--checkpoint={checkpoint}")
    assert not (checkpoint / "run").exists()


def test_processes_need_each_other(cached, tmp_path):
    flags = tiny_run.flags(cached, tmp_path / "run")
    assert "need --coordinator" in refused(flags, "--num_processes=2")
    assert "needs --num_processes" in refused(flags, "--coordinator=localhost:1")


# How it ends.


def small_disk(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.slow  # test_checkpoint.py has it within a process
def test_a_full_disk_ends_the_run_with_the_older_state_whole(cached, tmp_path):
    flags = functools.partial(tiny_run.flags, cached, tmp_path / "run", **MESH)
    train(flags(train__steps=2))
    text = refused(flags(train__steps=4), patch=functools.partial(small_disk, 1 << 16))
    assert "no space for the state of step 4" in text and "step 2 is whole" in text
    done = train(flags(train__steps=4))
    assert "on from step 2" in done.stdout
    assert len(tiny_run.lines(tmp_path / "run")) == 4


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_says_on_what(tmp_path):
    data = tiny_run.write_cached(tmp_path / "cached", bad=tuple(tiny_run.NAMES))
    flags = tiny_run.flags(data, tmp_path / "run", train__max_bad_steps=2, **MESH)
    text = refused(flags, code=1)
    assert text.startswith("error: step 2: loss None") and "Its samples: clip-" in text


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_told_to_stop_it_saves_and_ends(cached, tmp_path, number):
    run_ = tmp_path / "run"
    with Job(tmp_path / "0", tiny_run.flags(cached, run_, train__steps=10**6, **MESH)) as job:
        job.wait_for(lambda: steps(run_) >= 3)
        job.signal(number)
        assert job.wait() == [0], job.text()
        assert f"step {steps(run_)} of 1000000: stopped by a signal" in job.text()
        assert ("Ctrl-C again ends at once" in job.text()) == (number == signal.SIGINT)
    assert (run_ / "checkpoints" / str(steps(run_))).is_dir()


def _hang_in_the_third_step():
    from longlive_jax.training import metrics

    real = metrics.Metrics.add

    def add(self, number, *arguments):
        line = real(self, number, *arguments)
        if number == 3:
            self.flush()
            time.sleep(10**6)
        return line

    metrics.Metrics.add = add


def test_a_second_ctrl_c_ends_at_once(cached, tmp_path):
    run_, flags = tmp_path / "run", tiny_run.flags(cached, tmp_path / "run", **MESH)
    with Job(tmp_path / "0", flags, patch=_hang_in_the_third_step) as job:
        job.wait_for(lambda: steps(run_) >= 3)
        job.signal(signal.SIGINT)
        job.wait_for(lambda: "Ctrl-C again ends at once" in job.text())
        job.signal(signal.SIGINT)
        assert job.wait(20) == [-signal.SIGINT], job.text()
    assert "Traceback" not in job.text()
    assert not (run_ / "checkpoints/3").exists()


@pytest.mark.slow
def test_a_run_whose_steps_were_all_bad_ends_with_1(tmp_path):
    data = tiny_run.write_cached(tmp_path / "cached", bad=tuple(tiny_run.NAMES))
    flags = tiny_run.flags(data, tmp_path / "run", train__steps=2, **MESH)
    for _ in range(2):  # the second has nothing left to do
        text = refused(flags, code=1)
        assert "the last 2 of 2 steps" in text and "raise train.steps" in text


@pytest.mark.parametrize("name", ["train_ar_5b", "train_ar_5b_i2v", "train_ar_tiny"])
def test_configs_can_train(name):
    import importlib

    cfg = config_lib.from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    config_lib.validate_training(cfg)
    if name != "train_ar_tiny":
        assert (cfg.train.latent_frames, cfg.mesh.seq) == (96, 4)
        assert cfg.train.error_recycling.enabled
        assert cfg.video.image_to_video == name.endswith("i2v")
