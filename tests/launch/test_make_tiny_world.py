"""`launch.make_tiny_world`: what it writes is what the trainer and the sampler read."""

import json

import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax.data import sidecars
from longlive_jax.data.clips import VideoFolder
from longlive_jax.data.video_reader import probe, read_video
from longlive_jax.data.worlds import figure, shapes
from longlive_jax.prompts import shots as shots_lib
from tests.launch.commands import run

SMALL = ["--clips=3", "--seed=4", "--height=32", "--width=64"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "new" / "tiny"
    done = run("make_tiny_world", f"--output={folder}", *SMALL)
    assert done.stdout.startswith("wrote 3 clips, ")
    return folder


def captions(folder):
    return [json.loads(path.read_text())["caption"] for path in sorted(folder.glob("*.json"))]


def test_videos_and_captions_are_those_of_the_seed(made):
    assert sorted(path.name for path in made.iterdir()) == ["caption", "eval", "video"]
    clips = list(shapes.clips(4, 3))
    for number, shots in enumerate(clips):
        name = f"clip-{number:06d}"
        assert captions(made / "caption" / name) == [shot.caption for shot in shots]
        videos = sorted((made / "video" / name).iterdir())
        assert [path.name for path in videos] == [f"{i:06d}.mp4" for i in range(len(shots))]
        infos = [probe(path) for path in videos]
        assert [info.frames for info in infos] == [shot.frames for shot in shots]
        assert {(info.fps, info.height, info.width) for info in infos} == {(24, 32, 64)}
    decoded = read_video(made / "video" / "clip-000000" / "000000.mp4", 32, 64).astype(float)
    drawn = shapes.render(clips[0][0], 0, clips[0][0].frames, 32, 64)
    assert np.abs(decoded - drawn).mean() < 6  # colour is stored at half the size


def test_a_trainer_reads_it(made):
    cfg = config_lib.Config(
        video=config_lib.Video(height=32, width=64),
        data=config_lib.Data(path=str(made)),
        train=config_lib.Train(latent_frames=16),
    )
    source = VideoFolder(cfg)
    assert len(source) == 3
    for index in range(3):
        sample = source.sample(index, 0)
        assert sample.chunks == 2 and sample.frames.shape == (61, 32, 64, 3) and not sample.failures


def test_a_sampler_reads_the_held_out_captions(made):
    videos = shots_lib.read(
        made / "eval", chunks=4, chunk_frames=8, scene_cut_prefix="The scene transitions. "
    )
    expected = list(shapes.clips(4, len(videos), held_out=True))
    assert len(videos) == 16
    for video, shots in zip(videos, expected):
        assert video.chunks[0].prompt == shots[0].caption
        assert len(video.chunks) == 4
        first = next((i for i, chunk in enumerate(video.chunks) if chunk.cut), 4)
        assert first == min(4, max(1, shots[0].frames // 32)) or len(shots) == 1
    trained = {caption for folder in (made / "caption").iterdir() for caption in captions(folder)}
    assert not trained & {chunk.prompt for video in videos for chunk in video.chunks}


@pytest.mark.slow
def test_figures_have_their_actions_beside_them(tmp_path):
    done = run("make_tiny_world", f"--output={tmp_path}/new", "--figure", *SMALL)
    assert done.stdout.startswith("wrote 3 clips, ") and "16 held-out clips" in done.stdout
    made = tmp_path / "new"
    for folder, clips in (
        (made, figure.clips(4, 3)),
        (made / "eval", figure.clips(4, 16, held_out=True)),
    ):
        for number, shots in enumerate(clips):
            name = f"clip-{number:06d}"
            assert captions(folder / "caption" / name) == [s.figure.caption for s in shots]
            videos = sorted((folder / "video" / name).glob("*.mp4"))
            assert len(videos) == len(shots)
            for path, shot in zip(videos, shots):
                info = probe(path)
                actions = sidecars.read(sidecars.beside(path), info.frames, info.fps)
                assert len(actions) == shot.frames and actions.pose is not None
    test_a_trainer_reads_it(made)
    read = shots_lib.read(made / "eval/caption", chunks=4, chunk_frames=8, scene_cut_prefix="Cut. ")
    assert len(read) == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--output is missing"),
        (["--output={made}"], "already holds video; give another folder"),
        (["--output={made}/caption/clip-000000/000000.json"], "give a folder"),
        (["--output={new}", "--clips=0"], "--clips=0 must be at least 1"),
        (["--output={new}", "--seed=-1"], "--seed=-1 must be at least 0"),
        (["--output={new}", "--height=33"], "--height=33 must be even"),
        (["--output={new}", "--width=30"], "--width=30 must be even"),
    ],
)
def test_bad_flags(made, tmp_path, flags, message):
    new = tmp_path / "new"
    words = [flag.format(made=made, new=new) for flag in flags]
    done = run("make_tiny_world", *words, check=False)
    assert done.code == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not new.exists()
