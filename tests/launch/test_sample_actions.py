"""launch.sample with a keyboard and a mouse: lines, sidecars, scripts, records; what is refused."""

import dataclasses
import json
import os

import numpy as np
import pytest

from longlive_jax import Pipeline
from longlive_jax.data import sidecars
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.video_reader import probe
from longlive_jax.prompts import scripts
from tests.launch.commands import ACTIONS, PROMPTS, TINY, run, save_tiny, write

FLAGS = [f"--config.{name}={value}" for name, value in ACTIONS.items()]
PICTURES = 61  # of two chunks
LINE = "w*20, w+d+yaw+3*12, pitch-2*10, still"
QUICK = {"video.height": 32, "video.width": 64, "sample.steps": 1, "dtype": "float32",
         "sample.vae_latents_per_call": 8}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("acting") / "ckpt", overrides=ACTIONS)


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline.from_checkpoint(checkpoint, overrides=QUICK, decodes=False)


@pytest.fixture(scope="module")
def sample(checkpoint, tmp_path_factory):
    """launch.sample of one prompt with the action path."""
    prompts = write(tmp_path_factory.mktemp("prompts") / "one.txt", PROMPTS[0])

    def call(*args, **kwargs):
        text = [] if "--prompts" in " ".join(map(str, args)) else [f"--prompts={prompts}"]
        return run("sample", *TINY, *FLAGS, f"--checkpoint={checkpoint}", *text, *args, **kwargs)

    return call


def latents(path):
    return np.load(path)["latents"]


@pytest.fixture(scope="module")
def walked(sample, tmp_path_factory):
    """A video of a line of actions."""
    folder = tmp_path_factory.mktemp("walked")
    sample(f"--actions={LINE}", f"--output={folder}/w.mp4", f"--save_latents={folder}/w.npz")
    return folder


def test_the_record_beside_the_video_makes_it_again(walked, sample, tmp_path):
    assert sorted(os.listdir(walked)) == ["w.actions.npz", "w.mp4", "w.npz"]
    record = sidecars.read(walked / "w.actions.npz", PICTURES, 24)
    line = sidecars.parse(LINE, PICTURES)
    assert record.keys == ("KeyW", "KeyS", "KeyA", "KeyD") and probe(walked / "w.mp4").frames == 61
    np.testing.assert_array_equal(record.keyboard[:, [0, 3]], line.keyboard)
    np.testing.assert_array_equal(record.mouse, line.mouse)
    sample(f"--actions={walked}/w.actions.npz", f"--save_latents={tmp_path}/l.npz")
    np.testing.assert_array_equal(latents(tmp_path / "l.npz"), latents(walked / "w.npz"))
    sample("--actions=still", f"--save_latents={tmp_path}/still.npz")
    assert np.abs(latents(tmp_path / "still.npz") - latents(walked / "w.npz")).max() > 1e-3


@pytest.mark.slow
def test_a_video_goes_on_with_its_own_actions(walked, sample, tmp_path):
    """Of the part that it goes on from they are in the sidecar beside it; the record has both."""
    done = sample(
        f"--continue_from={walked}/w.mp4", "--continue_frames=29", "--config.sample.chunks=1",
        "--actions=yaw-3", f"--output={tmp_path}/on.mp4", f"--save_latents={tmp_path}/on.npz",
    )  # fmt: skip
    assert "no sidecar" not in done.stderr
    record = sidecars.read(tmp_path / "on.actions.npz", 29 + 32, 24)
    before = sidecars.read(walked / "w.actions.npz")
    np.testing.assert_array_equal(record.mouse[:29], before.mouse[-29:])
    np.testing.assert_array_equal(record.mouse[29:], [[0, -3]] * 32)
    os.rename(walked / "w.actions.npz", walked / "moved.npz")
    try:
        done = sample(
            f"--continue_from={walked}/w.mp4", "--continue_frames=29", "--config.sample.chunks=1",
            f"--actions={tmp_path}/on.actions.npz", f"--save_latents={tmp_path}/again.npz",
        )  # fmt: skip
    finally:
        os.rename(walked / "moved.npz", walked / "w.actions.npz")
    assert "w.mp4: no sidecar beside it; in its pictures nothing is held" in done.stderr
    np.testing.assert_array_equal(latents(tmp_path / "again.npz"), latents(tmp_path / "on.npz"))


def made(chunks):
    return np.concatenate([np.asarray(chunk.latents) for chunk in chunks], axis=1)


@pytest.mark.slow
def test_entries_of_a_script_have_actions(pipeline, tmp_path):
    """Of text and of sidecars; what has none stands still. A line for all is the same video."""
    part = sidecars.parse("yaw+3*32")
    sidecars.write(tmp_path / "turn.actions.npz", part)
    entries = [
        {"prompt": PROMPTS[0], "chunks": 1, "actions": "w*9, d"},
        {"prompt": PROMPTS[1], "chunks": 1, "actions": "turn.actions.npz"},
        {"prompt": PROMPTS[0], "chunks": 1},
    ]
    path = write(tmp_path / "walk.json", entries)
    one = made(pipeline.generate(path))
    plain = [{k: v for k, v in entry.items() if k != "actions"} for entry in entries]
    two = made(pipeline.generate(plain, actions="w*9, d*20, yaw+3*32, still"))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - made(pipeline.generate(plain, actions="still"))).max() > 1e-4


@pytest.mark.slow
def test_a_live_stream_is_sampled_again_by_its_script(pipeline, tmp_path):
    session = pipeline.session(seed=3)
    session.prompt(PROMPTS[0])
    session.act(["KeyW"], (0, 1.7), t=0.5)
    chunks = [session.step(now=1.0)]
    session.act(["KeyW", "KeyA"], (0.3, -2.1), t=1.01)
    session.prompt(PROMPTS[1], cut=True)
    chunks.append(session.step(now=2.0))
    assert [r.event_id for chunk in chunks for r in chunk.receipts] == [1, 2]
    script = scripts.make(pipeline.cfg, session.script, 2, seed=3, actions=session.record())
    path = write(tmp_path / "script.json", json.loads(json.dumps([script]))[0:1])
    path.write_text(json.dumps(script))
    # By whole chunks, not by halves: XLA fuses them otherwise.
    np.testing.assert_allclose(made(pipeline.generate(path)), made(chunks), atol=1e-5)
    np.testing.assert_array_equal(made(session.replay()), made(chunks))


# What is refused.


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Files by name."""
    folder = tmp_path_factory.mktemp("bad")
    good = sidecars.parse("w*40, yaw+1", PICTURES)
    files = {
        "good": good, "rate": dataclasses.replace(good, fps=16), "long": sidecars.parse("w*62"),
        "space": sidecars.parse("w*30, space", PICTURES),
    }  # fmt: skip
    for name, actions in files.items():
        sidecars.write(folder / f"{name}.actions.npz", actions)
    arrays = dict(np.load(folder / "good.actions.npz"))
    mouse = arrays["mouse"].copy()
    mouse[3, 1] = np.nan
    for name, change in {
        "nan": {"mouse": mouse}, "key": {"keys": np.asarray(["Jump"])},
        "rows": {"mouse": np.ones((5, 2))},
    }.items():  # fmt: skip
        np.savez(folder / f"{name}.actions.npz", **(arrays | change))
    entry = {"prompt": PROMPTS[0], "chunks": 1}
    write(folder / "own.json", [entry | {"actions": "w"}, entry])
    write(folder / "far.json", [entry, entry | {"actions": "w*33"}])
    write(folder / "number.json", [entry | {"actions": 3}])
    (folder / "text.actions.jsonl").write_text("w*3")
    with VideoWriter(folder / "clip.mp4", 32, 64) as writer:
        writer.write(np.zeros((29, 32, 64, 3), np.uint8))
    sidecars.write(folder / "clip.actions.npz", sidecars.parse("w*30"))
    return folder


# arguments ({name}: a file), what the message must have in it
CASES = {
    "none": ("", "actions: none for video", "--actions", "'still' alone stands still"),
    "no such file": ("--actions={none}.npz", "none.npz: no such file"),
    "longer": (
        "--actions={long}.actions.npz",
        "62 rows for a video of 61",
        "longer than the video",
    ),
    "shorter line": ("--actions=w*60", "60 pictures for a video of 61: shorter", "', still'"),
    "piece": ("--actions=w*5,fly*3,still", "piece 2 of 3, 'fly*3'", "'fly' is unknown"),
    "rate": ("--actions={rate}.actions.npz", "fps=16, the video has 24", "resample"),
    "nan": ("--actions={nan}.actions.npz", "1 of 122 values of 'mouse' are not finite"),
    "unknown key": ("--actions={key}.actions.npz", "unknown key 'Jump'", "W3C"),
    "rows": ("--actions={rows}.actions.npz", "61 rows of keyboard, 5 rows of mouse"),
    "no sidecar": ("--actions={text}.actions.jsonl", "text.actions.jsonl: cannot be read"),
    "key of the model": ("--actions={space}.actions.npz", "'Space' is held in picture 30", "KeyD"),
    "no mouse": ("--actions={good}.actions.npz --config.actions.mouse_dim=0", "no mouse"),
    "no names": (
        "--actions=still --config.actions.keyboard_dim=5",
        "keyboard_dim=5",
        "actions.keyboard_keys",
    ),
    "another preset": (
        "--actions=w --config.actions.keyboard_dim=2",
        "actions.keyboard_dim is 2 by the config, 4 in the",
        "It fits with --config.actions.keyboar",
    ),
    "another alignment": (
        "--actions=w --config.actions.pad=11",
        "actions.pad is 11",
        "actions.pad=12",
    ),
    "other keys": (
        "--actions=w --config.actions.keyboard_keys=KeyW,KeyA,KeyS,KeyD",
        "actions.keyboard_keys is",
    ),
    "no path": ("--actions=w --config.actions.kind=none", "without an action path", "'none'"),
    "entries, no path": (
        "--prompts={own}.json --config.actions.kind=none",
        "without an action path",
    ),
    "twice": ("--actions=w --prompts={own}.json", "'own' has its own, and others are given"),
    "entry": ("--prompts={far}.json", "far, entry 2 of 2", "33 rows for a video of 32"),
    "entry's kind": ("--prompts={number}.json", '"actions": 3 must be a sidecar or a line of text'),
    "clip's": (
        "--actions=w --continue_from={clip}.mp4",
        "clip.actions.npz: 30 rows",
        "29 pictures",
    ),
    "over an input": ("--actions={good}.actions.npz --output={good}.mp4", "is read as"),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused(case, bad, sample, tmp_path):
    words, *fragments = CASES[case]
    for name in os.listdir(bad):
        stem = name.split(".")[0]
        words = words.replace(f"{{{stem}}}", str(bad / stem))
    words = words.replace("{none}", str(bad / "none"))
    output = [] if "--output" in words else [f"--output={tmp_path}/v.mp4"]
    done = sample(*words.split(), *output, check=False)
    assert done.code == 2, done.stderr
    assert not os.listdir(tmp_path)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    for fragment in fragments:
        assert fragment in line, line
