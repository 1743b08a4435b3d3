"""`launch.record_doom`: what it writes is what the trainer reads, with actions that play it again."""

import itertools
import json
import sys

import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax.data import sidecars
from longlive_jax.data.clips import VideoFolder
from longlive_jax.data.video_reader import probe, read_video
from longlive_jax.data.worlds.doom import record
from longlive_jax.data.worlds.doom.game import Games, Size, Start
from longlive_jax.prompts import shots as shots_lib
from tests.launch.commands import run

SIZE = Size(64, 96, 2)
SMALL = [
    "--clips=4",
    "--eval_clips=2",
    "--seed=3",
    "--height=64",
    "--width=96",
    "--seconds=3",
    "--cuts=0.5",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doom") / "new" / "world"
    done = run("record_doom", f"--output={folder}", *SMALL)
    assert done.stdout.startswith("wrote 4 clips, 12 s of video, and 4 held-out ones in ")
    return folder


def files(folder):
    """(video, sidecar, caption) of all shots."""
    for path in sorted((folder / "video").glob("*/*.mp4")):
        caption = folder / "caption" / path.parent.name / f"{path.stem}.json"
        yield path, sidecars.beside(path), json.loads(caption.read_text())["caption"]


def test_videos_sidecars_and_captions_are_those_of_the_seed(made):
    for split, folder in (("train", ""), ("routes", "eval/routes"), ("map", "eval/map")):
        count = 4 if split == "train" else 2
        clips = record.clips(3, count, frames=73, split=split, cuts=0.5)
        shots = list(itertools.chain(*clips))
        found = list(files(made / folder))
        assert len(found) == len(shots)
        for (video, sidecar, caption), shot in zip(found, shots):
            info = probe(video)
            assert (info.height, info.width, info.fps, info.frames) == (64, 96, 24, shot.frames)
            actions = sidecars.read(sidecar, info.frames, info.fps)
            start = Start.of_text(actions.source)
            assert (start.place, start.view, actions.view) == (shot.place, shot.view, shot.view)
            assert actions.keys == ("KeyW", "KeyS", "KeyA", "KeyD") and actions.pad == 12
            assert caption.startswith(f"{shot.view.capitalize()} person view, ")
            assert actions.pose.shape == (shot.frames, 7)


def test_the_game_plays_a_sidecar_again(made):
    video, sidecar, _ = next(files(made / "eval/map"))
    actions = sidecars.read(sidecar)
    with Games(SIZE) as games:
        frames, poses = record.replay(games, Start.of_text(actions.source), actions)
    np.testing.assert_array_equal(poses, actions.pose)
    assert np.abs(read_video(video, 64, 96).astype(float) - frames).mean() < 6


@pytest.mark.parametrize("folder", ["", "eval/routes", "eval/map"])
def test_a_trainer_reads_it(made, folder):
    cfg = config_lib.Config(
        video=config_lib.Video(height=64, width=96),
        data=config_lib.Data(path=str(made / folder)),
        train=config_lib.Train(latent_frames=16),
    )
    source = VideoFolder(cfg)
    assert len(source) == (2 if folder else 4)
    sample = source.sample(0, 0)
    assert sample.chunks == 2 and sample.frames.shape == (61, 64, 96, 3)


def test_a_sampler_reads_the_held_out_captions(made):
    videos = shots_lib.read(
        made / "eval/routes/caption", chunks=4, chunk_frames=8, scene_cut_prefix="Cut. "
    )
    captions = [caption for _, _, caption in files(made / "eval/routes")]
    assert len(videos) == 2 and videos[0].chunks[0].prompt == captions[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--output is missing"),
        (["--output={made}"], "already holds video; give another folder"),
        (["--output={new}", "--clips=0"], "--clips=0 must be at least 1"),
        (["--output={new}", "--eval_clips=-1"], "--eval_clips=-1 must be at least 0"),
        (["--output={new}", "--seconds=0.5"], "--seconds=0.5 must be 1 to 600"),
        (["--output={new}", "--seconds=nan"], "--seconds=nan must be 1 to 600"),
        (["--output={new}", "--eval_seconds=900"], "--eval_seconds=900 must be 1 to 600"),
        (["--output={new}", "--cuts=2"], "--cuts=2 must be 0 to 1"),
        (["--output={new}", "--height=100"], "--height=100 must be a multiple of 32"),
        (["--output={new}", "--supersample=9"], "--supersample=9 must be 1 to 4"),
        (["--output={new}", "--width=1920"], "--height=160, width=1920, supersample=2: the game"),
        (["--output={new}", "--places=mars"], "--places=mars: must be of maze, lava"),
        (["--output={new}", "--places=village"], "--places=village: held out, so nothing is left"),
    ],
)
def test_bad_flags(made, tmp_path, flags, message):
    new = tmp_path / "new"
    words = [flag.format(made=made, new=new) for flag in flags]
    done = run("record_doom", *words, check=False)
    assert done.code == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not new.exists()


def _without_the_game():
    sys.modules["vizdoom"] = None


def test_without_the_game_it_says_what_to_install(tmp_path):
    done = run("record_doom", f"--output={tmp_path}/new", patch=_without_the_game, check=False)
    assert done.code == 2 and "run `pip install vizdoom`" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "new").exists()
