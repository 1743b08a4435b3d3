"""The front door: networks of a checkpoint, videos from shots, streams."""

import dataclasses

import numpy as np
import pytest

from longlive_jax import Config, Pipeline, Session
from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError, NotFiniteError
from longlive_jax.sampling import draws
from tests.launch import commands

SIZE = {"video.height": 32, "video.width": 64}
QUICK = SIZE | {"sample.steps": 1, "sample.vae_latents_per_call": 8, "dtype": "float32"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return commands.save_tiny(tmp_path_factory.mktemp("tiny") / "ckpt")


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline.from_checkpoint(checkpoint, overrides=QUICK)


def test_settings_are_those_of_the_checkpoint(pipeline):
    tiny, cfg = commands.tiny_config(), pipeline.cfg
    assert (cfg.model, cfg.vae, cfg.umt5) == (tiny.model, tiny.vae, tiny.umt5)
    assert cfg.sample == dataclasses.replace(Config().sample, steps=1, vae_latents_per_call=8)
    assert pipeline.pixels == (32, 64)


def test_shots_are_the_video_of_a_session(pipeline):
    """Of the same prompts, cuts and seed: here by whole chunks, there by halves."""
    one, two = commands.PROMPTS
    shots = [{"prompt": one, "chunks": 2}, {"prompt": two, "chunks": 1}]
    chunks = list(pipeline.generate(shots, seed=5))
    assert [chunk.applied.cut for chunk in chunks] == [(False,), (False,), (True,)]
    assert [x.shape for chunk in chunks for x in chunk.frames] == [
        (1, n, 32, 64, 3) for n in (1, 28, 4, 28, 4, 28)
    ]
    session = pipeline.session(seed=5)
    assert isinstance(session, Session)
    for chunk in chunks:
        if chunk.index != 1:
            session.prompt((one, None, two)[chunk.index], cut=chunk.index > 0)
        made = session.step()
        assert made.applied == chunk.applied
        np.testing.assert_allclose(made.latents, chunk.latents, atol=1e-5)


def test_a_stream_begins_with_a_picture(pipeline, tmp_path):
    session = pipeline.session(image=commands.ROOT / "assets/photo.jpg")
    session.prompt(commands.PROMPTS[0])
    chunk = session.step()
    np.testing.assert_array_equal(chunk.latents[:, :1], session.start.first_frame)
    session.save(tmp_path / "s")
    (again,) = pipeline.restore(tmp_path / "s").replay()
    np.testing.assert_array_equal(again.latents, chunk.latents)


def test_what_is_not_finite_ends_a_video(pipeline, monkeypatch):
    real = draws.noise

    def noise(cfg, start, index):
        return real(cfg, start, index) * (float("nan") if index == 1 else 1)

    monkeypatch.setattr(draws, "noise", noise)
    given = []
    with pytest.raises(NotFiniteError, match="chunk 1 is not finite"):
        given.extend(pipeline.generate([{"prompt": commands.PROMPTS[0], "chunks": 3}]))
    assert [bool(chunk.finite) for chunk in given] == [True, False]  # it was asked for the third


def test_bad_input(checkpoint, pipeline, tmp_path):
    with pytest.raises(InputError, match=r"unknown key 'sample\.stepps'"):
        Pipeline.from_checkpoint(checkpoint, overrides={"sample.stepps": 1})
    with pytest.raises(InputError, match="has other sizes than the config"):
        Pipeline.from_checkpoint(checkpoint, Config())
    with pytest.raises(InputError, match="is no checkpoint"):
        Pipeline.from_checkpoint(tmp_path)
    workdir.write(tmp_path, workdir.Run({}, None, "model"))
    with pytest.raises(InputError, match="a training run does not keep all settings"):
        Pipeline.from_checkpoint(tmp_path)
    (tmp_path / "two.txt").write_text("a boat\na cat\n")
    with pytest.raises(InputError, match="2 videos; give the shots of one at a time"):
        pipeline.generate(tmp_path / "two.txt")
    with pytest.raises(InputError, match='shots, entry 1 of 1 has no "prompt"'):
        pipeline.generate([{}])
