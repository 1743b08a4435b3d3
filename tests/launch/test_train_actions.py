"""From videos with sidecars to a model that is driven, by commands; killed, and on; and refusals."""

import json
import os
import signal

import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import store
from longlive_jax.data import records
from longlive_jax.data import source as source_lib
from longlive_jax.data.clips import VideoFolder
from longlive_jax.recipes import LINEARS
from tests.data import acted_videos
from tests.launch.commands import run, write
from tests.multiprocess.processes import Job
from tests.training import tiny_run

ACTIONS = {
    "model.actions.kind": "module", "model.actions.heads": 2, "model.actions.head_dim": 16,
    "model.actions.layers": 1, "model.actions.keyboard_embed": 8, "model.actions.window": 4,
}  # fmt: skip
SIZES = {
    "video.height": 32, "video.width": 64, "sample.vae_latents_per_call": 1,
    "model.chunk_frames": 2, "train.latent_frames": 4, "train.batch_size": 2,
    "train.save_every": 1, "train.learning_rate": 0.01, "train.ema_start": 1,
    "train.ema_decay": 0.5, "data.workers": 0, "sample.steps": 2, "sample.window_frames": 8,
    "sample.sink_frames": 2,
} | ACTIONS  # fmt: skip
DMD = {
    "objective": "dmd", "distill.latent_frames": 8, "distill.steps": 3, "distill.student_every": 2,
    "distill.save_every": 1, "distill.ema_start": 1, "distill.learning_rate": 0.01,
    "distill.critic_learning_rate": 0.01, "distill.batch_size": 2, "distill.lora.rank": 4,
    "distill.action_guidance": 1.0,
}  # fmt: skip


def words(**overrides):
    values = SIZES | {k.replace("__", "."): v for k, v in overrides.items()}
    return ["--config=configs/tiny.py", *(f"--config.{k}={v}" for k, v in values.items())]


def config(**overrides):
    from configs import tiny

    values = tiny.get_config()
    values.update_from_flattened_dict(
        SIZES | {k.replace("__", "."): v for k, v in overrides.items()}
    )
    return lib.from_config_dict(values)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Folders of two shots."""
    root = tmp_path_factory.mktemp("videos")
    return acted_videos.write(root, {f"v{i}": [20, 18] for i in range(4)})


def encode(videos, checkpoint, output, **kwargs):
    return run(
        "encode_dataset", *words(), f"--config.data.path={videos}", f"--checkpoint={checkpoint}",
        f"--output={output}", "--epochs=2", **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoded(videos, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    encode(videos, checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def driven(encoded, checkpoint, tmp_path_factory):
    """A run that trains the action path alone, four steps without a break."""
    folder = tmp_path_factory.mktemp("driven") / "run"
    run("train", *train(encoded, folder), f"--checkpoint={checkpoint}")
    return folder


def train(data, workdir, **overrides):
    values = dict(train__steps=4, train__trainable="actions", data__cached=True) | overrides
    return [*words(**values), f"--config.data.path={data}", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def world(driven, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "ckpt"
    run(
        "export", *words(train__trainable="actions"), f"--checkpoint={driven}", f"--output={folder}"
    )
    return folder


def weights(checkpoint):
    stored = store.Stored(checkpoint, "dit")
    return params_lib.flatten(store.load(checkpoint, "dit", stored.spec()))


def figures(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    own = ("loss", "grad_norm", "_g", "rollout_difference", "samples", "error_by_level")
    return [{k: v for k, v in line.items() if k.endswith(own)} for line in lines]


# ---------------------------------------------------------------------------------------------
# Data.


@pytest.mark.slow
def test_the_rows_of_a_dataset_are_those_of_its_videos(encoded, videos):
    cfg = config(data__path=str(videos))
    stream = source_lib.batches(VideoFolder(cfg), (0,), 1, 0, cfg.train.seed, 0)
    found = records.Records(encoded, cfg)
    wanted, seen = [], set()
    for number, (sample,) in zip(range(8), stream):
        if (number // 4, sample.name) not in seen:
            seen.add((number // 4, sample.name))
            wanted.append(sample)
    stream.close()
    assert len(found) == len(wanted) == 8
    for i, sample in enumerate(wanted):
        again = found.sample(i, 0)
        assert again.name == sample.name
        np.testing.assert_array_equal(again.actions, sample.actions)


def die_before_the_actions():
    records.CLIPS_PER_FILE = 4
    write_shard = records.write_shard

    def kill(path, packed):
        if "actions-00001" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return write_shard(path, packed)

    records.write_shard = kill


def small_files():
    records.CLIPS_PER_FILE = 4


@pytest.mark.slow
def test_killed_between_latents_and_their_actions(videos, checkpoint, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    encode(videos, checkpoint, whole, patch=small_files)
    done = encode(videos, checkpoint, killed, patch=die_before_the_actions, check=False)
    assert done.code == -signal.SIGKILL and (killed / "latents-00001.arrayrecord").exists()
    encode(videos, checkpoint, killed, patch=small_files)
    for path in whole.iterdir():
        assert (killed / path.name).read_bytes() == path.read_bytes(), path.name


# ---------------------------------------------------------------------------------------------
# Training.


@pytest.mark.slow
def test_the_backbone_stays_to_the_bit_and_the_run_is_the_model(
    driven, world, checkpoint, tmp_path
):
    before, after = weights(checkpoint), weights(world)
    grown = after.keys() - before.keys()
    assert grown and all("action_model" in path for path in grown)
    for path, weight in before.items():
        np.testing.assert_array_equal(after[path], weight, err_msg="/".join(path))
    assert all(np.abs(after[path]).max() > 0 for path in grown if "proj_mouse" in path)

    prompts = write(tmp_path / "prompts.txt", "a boat")
    latents = {}
    for where in (driven, world):
        file = tmp_path / f"{where.name}.npz"
        run(
            "sample", *words(), f"--checkpoint={where}", f"--prompts={prompts}",
            f"--output={tmp_path / 'v.mp4'}", f"--save_latents={file}", "--actions=w*9, yaw+3*4",
            "--config.sample.chunks=2",
        )  # fmt: skip
        latents[where] = np.load(file)["latents"]
    np.testing.assert_array_equal(latents[driven], latents[world])


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["actions", "lora"])
def test_killed_at_any_moment_it_goes_on_with_the_same_bits(
    trainable, encoded, checkpoint, tmp_path
):
    """SIGKILL after a state is whole; then, for the last step, on another mesh."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    own = dict(train__trainable=trainable, distill__lora__rank=4, model__actions__dropout=0.3)
    more = f"--checkpoint={checkpoint}"
    run("train", *train(encoded, whole, train__steps=21, **own), more)
    flags = [*train(encoded, killed, train__steps=20, **own), more]
    with Job(tmp_path / "job", flags, devices=1) as job:
        job.wait_for(lambda: (killed / "checkpoints" / "2").exists(), seconds=1200)
        job.signal(signal.SIGKILL)
        assert job.wait() == [-signal.SIGKILL]
    assert "on from step" in run("train", *flags).stdout
    assert figures(killed) == figures(whole)[:20]
    mesh = train(encoded, killed, train__steps=21, mesh__fsdp=2, mesh__seq=2, **own)
    run("train", *mesh, more, devices=4)
    ours, theirs = figures(killed)[20], figures(whole)[20]
    assert ours["samples"] == theirs["samples"]
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-3)


@pytest.mark.slow
def test_a_student_is_distilled_with_its_action_path(world, videos, tmp_path):
    """On sidecars without videos; converted onto its base it is what is exported from its run."""
    for folder in videos.glob("caption/*"):
        (tmp_path / "walks" / folder.name).mkdir(parents=True)
        for i, text in enumerate(sorted(folder.iterdir())):
            target = tmp_path / "walks" / folder.name
            (target / text.name).write_bytes(text.read_bytes())
            beside = videos / "video" / folder.name / f"{i:06d}.actions.npz"
            (target / beside.name).write_bytes(beside.read_bytes())
    student = tmp_path / "student"
    flags = [*words(**DMD), f"--config.data.path={tmp_path / 'walks'}", f"--workdir={student}"]
    run("train", *flags, f"--checkpoint={world}")
    log = figures(student)
    assert all(line.get("student_rollout_difference", 0) < 1e-4 for line in log)
    for name, call in {
        "converted": ["convert", f"--lora={student}", f"--checkpoint={world}"],
        "exported": ["export", f"--checkpoint={student}"],
    }.items():
        run(call[0], *words(**DMD), *call[1:], f"--output={tmp_path / name}")
    converted, exported = (weights(tmp_path / name) for name in ("converted", "exported"))
    base = weights(world)
    for path, weight in exported.items():
        np.testing.assert_allclose(converted[path], weight, atol=1e-6, err_msg="/".join(path))
    changed = {path for path in base if not np.array_equal(exported[path], base[path])}
    linears = {("blocks", *name.split("."), "weight") for name in LINEARS}
    assert linears < changed and all("action_model" in path for path in changed - linears)
    assert any("proj_keyboard" in path for path in changed)

    again = [*words(**DMD, distill__steps=1), f"--config.data.path={tmp_path / 'walks'}"]
    run("train", *again, f"--workdir={tmp_path / 'again'}", f"--checkpoint={world}",
        f"--start={student}")  # fmt: skip
    assert figures(tmp_path / "again")[0]["student_loss"] != log[0]["student_loss"]


@pytest.mark.slow
def test_consistency_under_actions_is_a_start(encoded, world, tmp_path):
    """From videos with their actions; its adapters and its action path begin a student."""
    first, student = tmp_path / "first", tmp_path / "student"
    own = words(**DMD | {"objective": "consistency", "distill.consistency_levels": 8})
    data = [f"--config.data.path={encoded}", "--config.data.cached=True"]
    run("train", *own, *data, f"--workdir={first}", f"--checkpoint={world}")
    assert all(np.isfinite(line["loss"]) for line in figures(first))
    prompts = write(tmp_path / "prompts.txt", "a boat")
    flags = [*words(**DMD, distill__steps=1), f"--config.data.path={prompts}"]
    run("train", *flags, f"--workdir={student}", f"--checkpoint={world}", f"--start={first}")
    assert figures(student)[0]["student_rollout_difference"] < 1e-4


# ---------------------------------------------------------------------------------------------
# What is refused.


def refused(*arguments):
    done = run("train", *arguments, check=False)
    assert done.code == 2, (done.code, done.stderr)
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr
    assert "compiled" not in done.stdout
    return last


def test_data_without_actions_is_refused(checkpoint, tmp_path):
    data = tiny_run.write_cached(tmp_path / "data")
    own = train(data, tmp_path / "run", model__text_len=8)
    assert "holds no actions, and the model has an action path" in refused(
        *own, f"--checkpoint={checkpoint}"
    )
    plain = acted_videos.write(tmp_path / "videos", {"a": [20]}, sidecar=False)
    own = train(plain, tmp_path / "run", data__cached=False)
    assert "has no sidecar 000000.actions.npz" in refused(*own, f"--checkpoint={checkpoint}")
    assert not (tmp_path / "run").exists()


def test_what_is_frozen_must_be_there(checkpoint, tmp_path):
    data = tiny_run.write_cached(tmp_path / "data", acts=config().model.actions)
    own = train(data, tmp_path / "run", model__text_len=8)
    assert "keeps a transformer's weights as they are, and --checkpoint is missing" in refused(*own)
    text = refused(*words(**DMD), f"--config.data.path={data}", "--config.data.cached=True",
                   f"--checkpoint={checkpoint}", f"--workdir={tmp_path / 'run'}",
                   "--config.distill.latent_frames=4", "--config.model.text_len=8")  # fmt: skip
    assert "its dit has other sizes than the config" in text and "action_model" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["world_doom", "world_1_3b", "world_5b"])
def test_configs_of_worlds_can_train_and_distil(name):
    import importlib

    values = importlib.import_module(f"configs.{name}").get_config()
    cfg = lib.from_config_dict(values)
    lib.validate_training(cfg)
    assert cfg.model.actions.kind == "module" and cfg.model.chunk_frames in (2, 3, 4)
    assert cfg.model.actions.dropout and cfg.distill.action_guidance
    values.objective, values.sample.guidance_scale = "dmd", 1.0
    lib.validate_distillation(lib.from_config_dict(values))
    for kind in ("fp8", "nvfp4"):  # sizes that every cache takes
        values.quant.kv = kind
        lib.from_config_dict(values)
