"""An objective is a file of its own: a toy in a few lines (examples/), and what it gets for them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.train_toy import SPECS, Distillation
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.training import checkpoint, dry_run, loop, state
from longlive_jax.training.objective import Network
from longlive_jax.training.plan import Plan


def objective(accumulation=1, **mesh):
    return Distillation(mesh_lib.make_mesh(config_lib.Mesh(**mesh)), accumulation)


def inputs(toy):
    """The same rows in every run, in so many batches."""

    def batch(step):
        rows = np.random.default_rng(step).standard_normal(toy.batch.shape, np.float32)
        return jax.device_put(rows, toy.batch.sharding)

    teacher = params_lib.init(SPECS, jax.random.key(7), mesh=toy.mesh)
    return loop.Inputs(lambda steps: ((batch(i), None) for i in steps), frozen={"teacher": teacher})


def train(root, toy, steps=10):
    shown, plan = [], Plan("toy", steps=steps, save_every=4)
    with checkpoint.acquire(root, {"toy.size": 8}, network="student"):
        end, done = loop.run(toy, plan, root, inputs(toy), shown.append)
    assert done == loop.Done(steps, stopped=False)
    return jax.device_get(end), lines(root), shown


def lines(root):
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "whole", objective())


def test_networks_are_trained_in_their_steps(whole):
    _, log, shown = whole
    assert [("student_loss" in line) for line in log] == [i % 3 == 0 for i in range(10)]
    assert all("critic_loss" in line and "critic_grad_norm" in line for line in log)
    losses = [line["student_loss"] for line in log if "student_loss" in line]
    assert losses[-1] < losses[0]
    assert [line["student_distance"] for line in log if "student_distance" in line] == losses
    assert "student distance" in shown[2] and "student" not in shown[3]


def test_a_network_that_is_not_due_stays_as_it_is(tmp_path):
    (a, *_), (b, *_) = (train(tmp_path / str(n), objective(), n) for n in (1, 3))
    jax.tree.map(np.testing.assert_array_equal, a.networks["student"], b.networks["student"])
    assert np.any(a.networks["critic"].params["w"] != b.networks["critic"].params["w"])
    assert a.networks["critic"].ema is None and a.networks["student"].ema is not None


def test_a_stopped_run_goes_on_with_the_same_bits(whole, tmp_path):
    train(tmp_path, objective(), 5)
    end, log, shown = train(tmp_path, objective())
    assert f"on from step 5 of {tmp_path}" in shown
    jax.tree.map(np.testing.assert_array_equal, end, whole[0])
    assert [x.get("student_loss") for x in log] == [x.get("student_loss") for x in whole[1]]


@pytest.mark.parametrize(
    "other", [dict(data=2, fsdp=2, seq=2), dict(accumulation=4), dict(fsdp=2, accumulation=2)]
)
def test_mesh_and_accumulation_change_nothing(whole, other, tmp_path):
    end, log, _ = train(tmp_path, objective(**other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), end, whole[0])
    for ours, theirs in zip(log, whole[1], strict=True):
        assert ours["critic_loss"] == pytest.approx(theirs["critic_loss"], rel=1e-4)


def test_a_step_that_is_not_finite_leaves_its_networks_alone(tmp_path):
    toy = objective()

    def broken(steps):
        return (
            (jax.device_put(np.full(toy.batch.shape, np.nan, np.float32), toy.batch.sharding), None)
            for _ in steps
        )

    plan = Plan("toy", steps=5, save_every=5, max_bad_steps=2)
    message = r"step 2: critic loss None, critic gradient norm None \(null: not finite\), 2 steps"
    with (
        checkpoint.acquire(tmp_path, {}, network="student"),
        pytest.raises(loop.DivergedError, match=message),
    ):
        loop.run(toy, plan, tmp_path, loop.Inputs(broken, frozen=inputs(toy).frozen), print)


def overflowing(what):
    """The toy, whose gradients are finite and whose critic is not after a step."""
    toy = objective()
    last = {
        "weights": optax.sgd(1e30),
        "weights after two": optax.sgd(lambda count: jnp.where(count < 2, 1e-31, 1e30)),
        "moments": optax.adam(0.01),  # of the gradient's square
    }[what]
    toy.networks["critic"] = Network(SPECS, optax.chain(optax.scale(1e30), last))
    return toy


@pytest.mark.parametrize("what, good", [("weights", 0), ("weights after two", 2), ("moments", 0)])
def test_weights_that_are_not_finite_are_never_written(tmp_path, what, good):
    toy, shown = overflowing(what), []
    plan = Plan("toy", steps=6, save_every=6, max_bad_steps=3)
    message = rf"step {good + 3}: critic loss \d.*\(finite, but not the weights .* 3 steps in a row"
    with (
        checkpoint.acquire(tmp_path, {}, network="student"),
        pytest.raises(loop.DivergedError, match=message),
    ):
        loop.run(toy, plan, tmp_path, inputs(toy), shown.append)
    assert [line["bad_in_row"] for line in lines(tmp_path)] == [0] * good + [1, 2, 3]
    (text,) = [text for text in shown if text.startswith(f"step {good + 1}/6")]
    assert "NOT FINITE, left out; 1 in a row" in text


@pytest.mark.parametrize("bad, left", [((5,), 1), ((3, 4, 5), 3), ((0, 1), 0), ((4,), 0)], ids=str)
def test_a_run_whose_last_steps_were_bad_is_not_done(tmp_path, bad, left):
    toy = objective()

    def batches(steps):
        for step, (batch, names) in zip(steps, inputs(toy).batches(steps)):
            yield batch * jnp.float32(np.nan if step in bad else 1), names

    def run(steps=6):
        with checkpoint.acquire(tmp_path, {}, network="student"):
            plan = Plan("toy", steps=steps, save_every=4, max_bad_steps=5)
            given = loop.Inputs(batches, frozen=inputs(toy).frozen)
            return loop.run(toy, plan, tmp_path, given, print)

    if not left:
        assert run()[1] == loop.Done(6, stopped=False)
        return
    for _ in range(2):  # also the same command again, which has nothing left to do
        with pytest.raises(loop.DivergedError, match=rf"the last {left} of 6 steps .* toy\.steps"):
            run()
    found, done = run(8)  # on from what was saved
    assert done.step == 8 and found.bad.tolist() == [left, 0]


def test_a_dry_run_tells_the_programs_apart():
    text = dry_run.report(objective(fsdp=2))
    for words in ("student optimiser", "critic parameters", "frozen arrays",
                  "the compiled step of student, critic", "the compiled step of critic"):  # fmt: skip
        assert words in text
    assert "moving average" in text and "critic moving average" not in text


def test_the_state_has_a_tree_for_each_network():
    found = state.abstract(objective(fsdp=2, seq=2))
    assert set(found.networks) == {"student", "critic"} and found.carried is None
    assert found.networks["student"].ema["w"].sharding.shard_shape((8, 8)) == (2, 8)
