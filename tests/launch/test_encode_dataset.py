"""launch.encode_dataset: from folders of videos to records, also in several attempts."""

import concurrent.futures
import functools
import json
import os
import signal

import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.data import progress, records
from longlive_jax.data.progress import Progress
from longlive_jax.data.video import VideoWriter
from longlive_jax.pipeline import Pipeline
from tests.launch.commands import PROMPTS, run, save_tiny, write

SIZES = {
    "video.height": 32, "video.width": 64, "sample.vae_latents_per_call": 1,
    "model.chunk_frames": 2, "train.latent_frames": 4,
}  # fmt: skip
FLAGS = ["--config=configs/tiny.py", *(f"--config.{k}={v}" for k, v in SIZES.items())]
CUT = "The scene transitions. "
FRAMES = 13  # of four latents
# Frames of each file of each folder. The last folder's file is damaged.
FOLDERS = {"v0": (FRAMES,), "v1": (60,), "v2": (6, 9), "v3": (FRAMES,)}
EPOCHS = 3


def config(**train):
    from configs import tiny

    values = tiny.get_config()
    values.update_from_flattened_dict(SIZES | {f"train.{k}": v for k, v in train.items()})
    return config_lib.from_config_dict(values)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for i, (name, files) in enumerate(FOLDERS.items()):
        for j, count in enumerate(files):
            (root / "caption" / name).mkdir(parents=True, exist_ok=True)
            caption = json.dumps({"caption": PROMPTS[(i + j) % 2]})
            write(root / "caption" / name / f"{j:06d}.json", caption)
            with VideoWriter(root / "video" / name / f"{j:06d}.mp4", 32, 64) as writer:
                writer.write(draw.integers(0, 256, (count, 32, 64, 3)).astype(np.uint8))
    (root / "video/v3/000000.mp4").write_bytes(b"no video")
    return root


def small_files():
    records.CLIPS_PER_FILE, records.PROMPTS_PER_FILE = 4, 2


@pytest.fixture(scope="module")
def encode(checkpoint, videos):
    def call(output, *args, patch=small_files, **kwargs):
        return run(
            "encode_dataset", *FLAGS, f"--config.data.path={videos}", "--config.data.workers=0",
            "--config.data.max_bad_share=0.5", f"--checkpoint={checkpoint}", f"--output={output}",
            f"--epochs={EPOCHS}", *args, patch=patch, **kwargs,
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def encoded(encode, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded") / "out"
    return folder, encode(folder)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(folder, cfg=None):
    source = records.Records(folder, cfg or config())
    return [source.sample(i, 0) for i in range(len(source))]


def test_every_folder_once_an_epoch(encoded):
    folder, done = encoded
    found = samples(folder)
    assert [sorted(s.name for s in found[i : i + 3]) for i in (0, 3, 6)] == [["v0", "v1", "v2"]] * 3
    by_name = {name: [s for s in found if s.name == name] for name in FOLDERS}
    # The long one starts elsewhere each time.
    starts = [s.latents.tobytes() for s in by_name["v1"]]
    assert len(set(starts)) == EPOCHS
    prompts = {name: {s.prompts for s in some} for name, some in by_name.items()}
    assert prompts == {
        "v0": {(PROMPTS[0],) * 2}, "v1": {(PROMPTS[1],) * 2},
        "v2": {(PROMPTS[0], CUT + PROMPTS[1])}, "v3": set(),
    }  # fmt: skip
    assert {s.chunks for s in found} == {2}
    assert sorted(os.listdir(folder)) == [
        "failures.jsonl", "latents-00000.arrayrecord", "latents-00001.arrayrecord",
        "latents-00002.arrayrecord", "manifest.json", "text-00000.arrayrecord",
        "text-00001.arrayrecord",
    ]  # fmt: skip
    assert done.stdout.startswith("9 clips, 3 prompts, 2 failures, 5 files, ")
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert failures[0]["path"].endswith("video/v3/000000.mp4")
    assert records.read_manifest(folder)["failures"] == len(failures) == 2


def test_latents_are_those_of_launch_encode(encoded, videos, checkpoint, tmp_path):
    run(
        "encode", *FLAGS, f"--checkpoint={checkpoint}", f"--output={tmp_path}/l.npz",
        f"--video={videos}/video/v0/000000.mp4",
    )  # fmt: skip
    expected = np.moveaxis(np.load(tmp_path / "l.npz")["latents"][0], 1, -1)
    for sample in samples(encoded[0]):
        if sample.name == "v0":
            np.testing.assert_array_equal(sample.latents, expected)


def test_contexts_are_the_prompts(encoded, checkpoint):
    cfg = config()
    mesh = mesh_lib.make_mesh(cfg.mesh)
    prompts = [PROMPTS[0], PROMPTS[1], CUT + PROMPTS[1]]
    rows = Pipeline(checkpoint, cfg, mesh).embed(prompts, guided=False)(prompts)
    for sample in samples(encoded[0]):
        assert sample.text.shape == (2, 32, 32)
        for text, prompt in zip(sample.text, sample.prompts):
            expected = rows[prompts.index(prompt)]
            np.testing.assert_allclose(text, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
            np.testing.assert_array_equal(text == 0, expected == 0)


def die(where):
    """Makes the process kill itself: in a file's records, beside its progress, at the end."""

    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def then_kill(call):
        return lambda *args, **kwargs: (call(*args, **kwargs), kill())

    small_files()
    write_shard, add = records.write_shard, Progress.add
    if where in ("latents-00001", "text-00001"):

        def write_until(path, packed):
            def until():
                yield next(packed)
                if where in str(path):
                    kill()
                yield from packed

            return write_shard(path, until())

        records.write_shard = write_until
    elif where == "between a file and its line":
        Progress.add = kill
    elif where == "after a line":
        Progress.add = then_kill(add)
    elif where == "before the manifest":
        Progress.finish = kill
    elif where == "after the manifest":
        progress.write_manifest = then_kill(progress.write_manifest)


@pytest.mark.slow
def test_killed_and_run_again(encoded, encode, tmp_path):
    out = tmp_path / "out"
    for where in ("latents-00001", "between a file and its line", "after a line", "text-00001",
                  "before the manifest", "after the manifest"):  # fmt: skip
        done = encode(out, patch=functools.partial(die, where), check=False)
        assert done.code == -signal.SIGKILL, (where, done)
        if where != "after the manifest":
            assert not (out / "manifest.json").exists()
    encode(out)
    assert content(out) == content(encoded[0])


def test_several_processes_make_the_same(encoded, encode, tmp_path):
    """One of them is killed at a file; another comes later."""
    out = tmp_path / "out"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        dying = functools.partial(die, "latents-00001")
        calls = [pool.submit(encode, out, patch=p, check=False) for p in (small_files, dying)]
        codes = {call.result().code for call in calls}
    assert 0 in codes and codes <= {0, -signal.SIGKILL}
    assert content(out) == content(encoded[0])


@pytest.mark.slow
def test_processes_decode_the_same(encoded, encode, tmp_path):
    encode(tmp_path / "out", "--config.data.workers=1")
    assert content(tmp_path / "out") == content(encoded[0])


def test_files_that_went_while_it_was_stopped(encode, tmp_path):
    out = tmp_path / "out"
    encode(out, patch=functools.partial(die, "after a line"), check=False)
    (out / "latents-00000.arrayrecord").unlink()
    done = encode(out, check=False)
    assert done.code == 2
    assert "latents-00000.arrayrecord: is gone" in done.stderr


@pytest.mark.slow
def test_a_mesh_encodes_the_same(encoded, encode, tmp_path):
    flags = "--config.mesh.data=3", "--config.mesh.seq=2", "--config.train.batch_size=3"
    # Between two attempts, the mesh may change.
    begin = functools.partial(die, "after a line")
    assert encode(tmp_path / "out", patch=begin, check=False).code == -signal.SIGKILL
    encode(tmp_path / "out", *flags, devices=6)
    for a, b in zip(samples(tmp_path / "out"), samples(encoded[0]), strict=True):
        assert (a.name, a.prompts) == (b.name, b.prompts)
        np.testing.assert_allclose(
            a.latents, b.latents, rtol=0, atol=1e-5 * np.abs(b.latents).max()
        )
        np.testing.assert_array_equal(a.text, b.text)


def test_a_finished_folder_stays(encoded, encode):
    folder, first = encoded
    before = content(folder)
    again = encode(folder)
    assert again.stdout.partition(" s: ")[2] == first.stdout.partition(" s: ")[2]
    for flag, message in (
        ("--epochs=2", "begun with --epochs=3, now it is 2; give the same again"),
        ("--config.train.seed=1", "begun with train.seed=0, now it is 1"),
        ("--config.dtype=bfloat16", "begun with dtype='float32', now it is 'bfloat16'"),
    ):
        done = encode(folder, flag, check=False)
        assert done.code == 2
        assert message in done.stderr
    assert content(folder) == before


def test_the_text_encoder_is_trained(videos, tmp_path):
    checkpoint = save_tiny(tmp_path / "ckpt", parts=("vae",), trees=("encoder", "conv1"))
    run(
        "encode_dataset", *FLAGS, f"--config.data.path={videos}", "--config.data.workers=0",
        f"--checkpoint={checkpoint}", f"--output={tmp_path}/out",
        "--config.train.text_encoder=True",
    )  # fmt: skip
    found = samples(tmp_path / "out", config(text_encoder=True))
    assert sorted(s.name for s in found) == ["v0", "v1", "v2"]
    assert all(s.text is None and s.latents.dtype == np.float32 for s in found)
    assert not list(tmp_path.glob("out/text*"))


@pytest.mark.slow
def test_too_much_is_unreadable(encode, tmp_path):
    flags = "--epochs=6", "--config.data.max_bad_share=0.2"
    done = encode(tmp_path / "out", *flags, check=False)
    assert done.code == 2
    assert "5 of 20 samples read met something unreadable" in done.stderr
    assert len((tmp_path / "out/failures.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--output="], "--output is missing"),
        (["--checkpoint="], "--checkpoint is missing"),
        (["--config.data.cached=True"], "videos are encoded here"),
        (["--config.train.latent_frames=3"], "must be a multiple of model.chunk_frames=2"),
        (["--config.data.path=/nowhere"], "config: data.path='/nowhere' must be a folder"),
        (["--config.model.in_dim=8", "--config.model.out_dim=8"], "must equal model.in_dim=8"),
        (["--config.mesh.seq=3", "--config.train.latent_frames=6"], "mesh"),
    ],
)
def test_bad_input(encode, tmp_path, flags, message):
    done = encode(tmp_path / "out", *flags, check=False)
    assert done.code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else(encode, videos):
    done = encode(videos, check=False)
    assert done.code == 2
    assert "and no cached training data; give a new folder" in done.stderr
