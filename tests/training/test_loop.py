"""A run in this process: it learns, it goes on with the same bits, it knows when to stop."""

import functools
import json
import shutil

import numpy as np
import pytest

from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError
from longlive_jax.training import checkpoint, feed, loop, state
from longlive_jax.training.objectives import teacher_forcing
from longlive_jax.training.plan import Plan
from tests.training import tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_cached(tmp_path_factory.mktemp("data") / "cached")


def train(root, data, mesh=(1, 2, 2), **overrides):
    """Runs `loop.run` in the folder `root`; what it showed, and how it ended."""
    names = dict(zip(("mesh__data", "mesh__fsdp", "mesh__seq"), mesh))
    cfg = tiny_run.config(data__path=str(data), **names, **overrides)
    objective = teacher_forcing.TeacherForcing(cfg, mesh_lib.make_mesh(cfg.mesh))
    source, identity = feed.open_source(cfg)
    shown = []

    batches = functools.partial(
        feed.Prefetcher, cfg, objective.mesh, source, feed.Encoders(), root / "failures.jsonl"
    )
    with checkpoint.acquire(root, teacher_forcing.settings(cfg, identity), "model"):
        _, done = loop.run(objective, Plan.of(cfg.train), root, loop.Inputs(batches), shown.append)
    return done, shown


def saved(root, **overrides):
    """The newest state of a run."""
    cfg = tiny_run.config(mesh__fsdp=2, mesh__seq=2, **overrides)
    objective = teacher_forcing.TeacherForcing(cfg, mesh_lib.make_mesh(cfg.mesh))
    states = checkpoint.Checkpoints(root, Plan.of(cfg.train))
    found = states.restore(state.abstract(objective))
    states.close()
    return found


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "whole"
    train(root, data)
    return root


def test_the_loss_falls(whole):
    losses = [line["loss"] for line in tiny_run.lines(whole)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2]), losses


def test_a_line_has_what_is_promised(whole):
    for line in tiny_run.lines(whole):
        assert line["loss"] == float(str(np.float32(line["loss"])))
        assert len(line["samples"]) == 8 and set(line["samples"]) <= set(tiny_run.NAMES)
        assert line["bad_steps"] == line["bad_in_row"] == 0
        assert line["seconds"] > 0 and line["tokens_per_second"] > 0
        assert line["tflops_per_device"] > 0 and 0 < line["goodput"] <= 1
        assert len(line["error_by_level"]) == 10
    assert list((whole / "tensorboard").iterdir())


def test_each_record_comes_once_an_epoch(whole):
    names = [name for line in tiny_run.lines(whole) for name in line["samples"]]
    for start in range(0, len(names) - 6, 7):
        assert sorted(names[start : start + 7]) == tiny_run.NAMES


@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "half"
    done, shown = train(root, data, train__steps=3)
    assert done == loop.Done(3, stopped=False) and shown[-1].startswith("step 3/3  loss ")
    return root


def test_goes_on_with_the_same_bits(whole, half, data, tmp_path):
    root = shutil.copytree(half, tmp_path / "run")
    # What a process leaves that is killed: lines of steps that were not saved, a line cut in two.
    with (root / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 7.0}\n{"step": 5, "lo')
    done, shown = train(root, data)
    assert done.step == 8 and f"on from step 3 of {root}" in shown
    assert tiny_run.numbers(root) == tiny_run.numbers(whole)
    assert tiny_run.equal(saved(root), saved(whole))


@pytest.mark.slow
def test_goes_on_on_another_mesh(whole, half, data, tmp_path):
    root = shutil.copytree(half, tmp_path / "run")
    train(root, data, mesh=(1, 1, 2))
    for ours, theirs in zip(tiny_run.lines(root), tiny_run.lines(whole), strict=True):
        assert ours["samples"] == theirs["samples"]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


def test_a_run_that_is_done_stays_done(whole, data):
    before = tiny_run.numbers(whole)
    done, shown = train(whole, data)
    assert done == loop.Done(8, stopped=False) and f"on from step 8 of {whole}" in shown
    assert tiny_run.numbers(whole) == before


def test_a_bad_step_is_left_out_and_many_stop_the_run(tmp_path):
    data = tiny_run.write_cached(tmp_path / "some", bad=("clip-3",))
    with pytest.raises(loop.DivergedError, match="the last 4 of 4 steps"):
        train(tmp_path / "a", data, train__steps=4)  # a batch has more rows than there are clips
    lines = tiny_run.lines(tmp_path / "a")
    for line in lines:
        assert (line["loss"] is None) == ("clip-3" in line["samples"])
    assert lines[-1]["bad_steps"] == sum(line["loss"] is None for line in lines) > 0
    assert workdir.State(tmp_path / "a").step == 4
    data = tiny_run.write_cached(tmp_path / "all", bad=tuple(tiny_run.NAMES))
    with pytest.raises(loop.DivergedError, match=r"3 steps in a row .* Its samples: clip-\d, clip"):
        train(tmp_path / "b", data, train__max_bad_steps=3)
    assert len(tiny_run.lines(tmp_path / "b")) == 3


def test_other_settings_are_refused_by_name(whole, data, tmp_path):
    for name, value in (("train.seed", 1), ("train.batch_size", 2), ("model.ffn_dim", 64)):
        with pytest.raises(InputError, match=rf"was begun with {name}="):
            train(whole, data, **{name.replace(".", "__"): value})
    other = tiny_run.write_cached(tmp_path / "other", names=tiny_run.NAMES[1:])
    with pytest.raises(InputError, match="the training data="):
        train(whole, other)


@pytest.mark.slow
def test_goes_on_from_a_run_made_before_there_were_several_networks(data, tmp_path):
    """tests/training/run_before: three steps, whose state has its only network's arrays at the top;
    the losses are those that the program of then went on with.
    """
    root = shutil.copytree(tiny_run.RUN_BEFORE, tmp_path / "run")
    source = feed.open_source(tiny_run.config(data__path=str(data), **tiny_run.BEFORE))
    run = json.loads((root / "run.json").read_text())
    run["settings"]["the training data"] = source[1]  # written anew, with names of today
    (root / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"was begun with train\.seed=0"):
        train(root, data, (1, 1, 1), **tiny_run.BEFORE, train__seed=1)
    done, shown = train(root, data, (1, 1, 1), **tiny_run.BEFORE | dict(train__steps=6))
    assert done.step == 6 and f"on from step 3 of {root}" in shown
    losses = [line["loss"] for line in tiny_run.lines(root)[3:]]
    np.testing.assert_allclose(losses, [1.7225786, 1.4382145, 1.9626296], rtol=1e-5)
    assert workdir.read(root).network == "model" and workdir.State(root).step == 6
