"""Evaluation with a recipe: its videos are those of the averages, quantised."""

import json

import jax
import numpy as np
import pytest

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.data.video_reader import probe
from longlive_jax.data.worlds import shapes
from longlive_jax.errors import InputError, NotFiniteError
from longlive_jax.models import dit
from longlive_jax.quant import weights
from longlive_jax.sampling.chunk import Chunk, Frames, Making
from longlive_jax.sampling.decode import Pictures
from longlive_jax.training import evaluate
from tests.training import tiny_run


@pytest.mark.slow
def test_the_average_is_quantised(monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("a boat\n")
    cfg = tiny_run.config(
        quant__recipe="fp8_train", dtype="bfloat16", mesh__fsdp=2, mesh__seq=2, sample__window_frames=8,
        sample__sink_frames=2, train__eval_every=1, data__eval_path=str(tmp_path / "prompts.txt"),
    )  # fmt: skip
    mesh = mesh_lib.make_mesh(cfg.mesh)
    prompts = evaluate.read_prompts(cfg, mesh)
    evaluator = evaluate.Evaluator(cfg, mesh, tmp_path, prompts, {}, lambda average: None)
    made = []

    class Enough(Exception):
        pass

    def render(engine, *args, **kwargs):
        made.append(engine.params)
        raise Enough

    monkeypatch.setattr(evaluate.decode, "Decoder", lambda *args: None)
    monkeypatch.setattr(evaluate.render, "render", render)
    specs = dit.spec(cfg.model)
    masters = params_lib.init(specs, jax.random.key(0), mesh=mesh)
    with pytest.raises(Enough):
        evaluator(1, {"dit": masters})
    own = recipe_lib.get("fp8_train")
    expected = weights.quantize_params(
        jax.tree.map(lambda w: w.astype(cfg.compute_dtype), jax.device_get(masters)), specs, own
    )
    expected = dit.layers(expected)
    assert jax.tree.structure(made[0]) == jax.tree.structure(expected)
    where = params_lib.shardings(
        dit.sampling_spec(cfg.model, own, cfg.compute_dtype), mesh, mesh_lib.SAMPLING_RULES
    )
    for x, y, sharding in zip(*map(jax.tree.leaves, (made[0], expected, where)), strict=True):
        assert x.sharding == sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def chunk_of(index, frames, good):
    """A chunk of these frames, in one piece."""
    finite = jax.numpy.bool_(good)
    making = Making(1, iter([(None, Pictures(frames, finite))]), lambda state: None)
    return Chunk(
        index, Frames(making), frames, None, finite, jax.numpy.float32(1), str, making, None
    )


def test_a_diverged_average_ends_the_run_and_the_good_part_stays(monkeypatch, tmp_path):
    """The second chunk is not finite: the first one's frames are there, and no contact sheet."""
    (tmp_path / "prompts.txt").write_text("a boat\n")
    cfg = tiny_run.config(train__eval_every=1, data__eval_path=str(tmp_path / "prompts.txt"))
    mesh = mesh_lib.make_mesh(cfg.mesh)
    prompts = evaluate.read_prompts(cfg, mesh)
    evaluator = evaluate.Evaluator(cfg, mesh, tmp_path, prompts, {}, lambda average: None)
    left = tmp_path / f"evaluation/step-000001/.{prompts.videos[0].name}.partial-999999999.mp4"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a killed run")

    def render(*args):
        for index, good in enumerate((True, False)):
            frames = jax.numpy.zeros((1, 5, *prompts.batch.pixels, 3), "uint8")
            yield chunk_of(index, frames, good)

    monkeypatch.setattr(evaluate.decode, "Decoder", lambda *args: None)
    monkeypatch.setattr(evaluate.render, "render", render)
    masters = params_lib.init(dit.spec(cfg.model), jax.random.key(0), mesh=mesh)
    with pytest.raises(NotFiniteError, match="chunk 1"):
        evaluator(1, {"dit": masters})
    (video,) = left.parent.iterdir()
    assert video.suffix == ".mp4" and probe(video).frames == 5


def test_videos_are_graded_and_others_prompts_refused(monkeypatch, tmp_path):
    """Of real clips of the world every chunk is right: a grade of 1."""
    shots = next(shapes.clips(3, 1))[:2]
    (tmp_path / "prompts.json").write_text(
        json.dumps([{"prompt": one.caption, "chunks": 1} for one in shots])
    )
    settings = dict(
        model__chunk_frames=8, train__latent_frames=16, video__height=128, video__width=192,
        train__eval_every=1, train__eval_chunks=2, train__eval_grade="shapes",
    )  # fmt: skip
    cfg = tiny_run.config(data__eval_path=str(tmp_path / "prompts.json"), **settings)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    prompts = evaluate.read_prompts(cfg, mesh)
    evaluator = evaluate.Evaluator(cfg, mesh, tmp_path, prompts, {}, lambda average: None)

    def rendered(*args):
        for index, (one, count) in enumerate(zip(shots, (29, 32))):
            frames = jax.numpy.asarray(shapes.render(one, 0, count))[None]
            yield chunk_of(index, frames, True)

    monkeypatch.setattr(evaluate.decode, "Decoder", lambda *args: None)
    monkeypatch.setattr(evaluate.render, "render", rendered)
    masters = params_lib.init(dit.spec(cfg.model), jax.random.key(0), mesh=mesh)
    made = evaluator(1, {"dit": masters})
    assert made.grade == 1.0
    assert json.loads((made.folder / "grade.json").read_text())["summary"]["all_right"] == 1

    (tmp_path / "prompts.txt").write_text("a boat\n")
    cfg = tiny_run.config(data__eval_path=str(tmp_path / "prompts.txt"), **settings)
    with pytest.raises(InputError, match="'a boat' is not of the world of shapes"):
        evaluate.read_prompts(cfg, mesh)
