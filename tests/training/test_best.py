"""The best checkpoint of a run, by grade."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError
from longlive_jax.files.orbax import ocp
from longlive_jax.training.best import Best


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "run[lr=1e-5]"  # Orbax would take the name for a pattern
    folder.mkdir()
    workdir.write(folder, workdir.Run({"model.num_heads": 8}, "ckpt", "model"))
    return folder


def weights(value):
    return {"dit": {"w": jnp.full((3, 2), value, jnp.float32)}}


def kept(root):
    """The step, and the weights that a sampler takes."""
    state = workdir.State(root / "best")
    path = root / "best" / workdir.STATES / str(state.step)
    tree = ocp.load(str(path))["networks"]["model"]["ema"]
    return state.step, float(np.asarray(jax.tree.leaves(tree)[0])[0, 0])


def test_the_best_is_kept_and_not_the_last(root):
    best = Best(root, "model")
    offers = [(10, 0.4), (20, 0.7), (30, 0.7), (40, 0.1)]
    assert [best.offer(s, g, weights(s)) for s, g in offers] == [True, True, False, False]
    assert kept(root) == (20, 20.0) and (best.step, best.grade) == (20, 0.7)
    assert workdir.State(root / "best").trained == ("dit",)
    assert workdir.read(root / "best") == workdir.read(root)
    content = json.loads((root / "best/best.json").read_text())
    assert (content["step"], content["grade"]) == (20, 0.7)


def test_a_run_that_goes_on_keeps_the_best_so_far(root):
    assert Best(root, "model").offer(20, 0.7, weights(20))
    again = Best(root, "model")
    assert (again.step, again.grade) == (20, 0.7)
    assert not again.offer(30, 0.6, weights(30)) and kept(root) == (20, 20.0)
    assert again.offer(40, 0.8, weights(40)) and kept(root) == (40, 40.0)


def test_what_a_killed_process_left_does_not_hide_the_best(root):
    """Weights have their grade with them: two whole ones, or half a third, are told apart."""
    Best(root, "model").offer(20, 0.7, weights(20))
    states = root / "best" / workdir.STATES
    shutil.copytree(states / "20", root / "before")
    Best(root, "model").offer(30, 0.8, weights(30))
    (root / "before").rename(states / "20")  # killed before the older one was removed
    shutil.copytree(states / "20", states / "35")  # of another run of these steps, and worse
    (states / "40.orbax-checkpoint-tmp").mkdir()
    again = Best(root, "model")
    assert (again.step, again.grade) == (30, 0.8) and kept(root) == (30, 30.0)


def test_a_grade_that_is_no_number_is_never_the_best(root):
    assert not Best(root, "model").offer(1, float("nan"), weights(1))
    assert not (root / "best").exists()


def test_damage_is_named(root):
    Best(root, "model").offer(20, 0.7, weights(20))
    for file in (root / "best" / workdir.STATES / "20").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match=r"best/checkpoints/20: is damaged"):
        Best(root, "model")
