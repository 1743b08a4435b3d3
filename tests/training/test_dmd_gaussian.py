"""A toy with scores in closed form: the data are one Gaussian, the student's videos another.

The student is noise times a number plus a number, and the critic has the mean and the deviation of
a Gaussian. Everything else is the trainer's own: steps, periods, optimisers, losses, draws.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import mesh as mesh_lib
from longlive_jax.params import ParamSpec, normal, ones
from longlive_jax.training import loop, state
from longlive_jax.training.objective import Moment, Network
from longlive_jax.training.objectives import rollout
from longlive_jax.training.objectives.dmd import CRITIC, DMD, NEGATIVE, STUDENT, TEACHER, Inputs
from longlive_jax.training.objectives.rollout import Clip
from longlive_jax.training.step import Step
from tests.training import tiny_distill

MEAN, DEVIATION = 1.5, 0.4


def velocity(x_t, sigma, mean, deviation):
    """E[noise - data | x_t] of Gaussian data; sigma broadcasts."""
    keep = 1 - sigma
    variance = (keep * deviation) ** 2 + sigma**2
    innovation = (x_t - keep * mean) / variance
    return sigma * innovation - (mean + keep * deviation**2 * innovation)


class Gaussians(DMD):
    """frozen[NEGATIVE] is read by nobody but the shape of the other prompt."""

    def __init__(self, cfg, mesh):
        super().__init__(cfg, mesh)
        one = {"shift": normal(0.1), "scale": ones}
        specs = {name: ParamSpec((1,), (None,), init) for name, init in one.items()}
        self.networks = {
            name: Network(specs, network.optimizer, network.ema_decay, network.period)
            for name, network in self.networks.items()
        }
        self.frozen = {NEGATIVE: self.frozen[NEGATIVE]}

    def transformer(self, name, params, frozen):
        if name == TEACHER:
            return {"shift": jnp.float32(MEAN), "scale": jnp.float32(DEVIATION)}
        return params[name]

    def _block_causal(self, name, tree, x_t, timestep, inputs, scripts):
        sigma = self.sigma(inputs)
        return velocity(x_t, sigma, *(jnp.reshape(tree[k], (1,) * 6) for k in ("shift", "scale")))

    def sigma(self, inputs):
        sigma = jnp.asarray(self.law.sigmas)[inputs.draws.level]
        return sigma.reshape(*sigma.shape, 1, 1, 1, 1)

    def inputs(self, network, moment, draws):
        made = self._made(moment.params[STUDENT], draws.noise)
        rows, frames = made.shape[:2], made.shape[:3]
        clip = Clip(
            x=draws.noise, x0=made, final=made, timestep=jnp.zeros(frames),
            sigma=jnp.ones(rows), position=jnp.zeros(rows, jnp.int32),
            visible=jnp.zeros((*rows, 1), jnp.int32),
        )  # fmt: skip
        inputs = Inputs(clip, moment.batch, draws, jnp.float32(made.size))
        return inputs if network == CRITIC else inputs.replace(g=self.scores(moment, inputs).g)

    def student_x0(self, tree, inputs):
        return self._made(tree, inputs.clip.x)

    def _made(self, tree, noise):
        scale, shift = (jnp.reshape(tree[k], (1,) * 6) for k in ("scale", "shift"))
        return scale * noise + shift


def objective(**overrides):
    cfg = tiny_distill.config(
        batch_size=8, learning_rate=0.02, critic_learning_rate=0.05, beta1=0.0, beta2=0.9,
        **{"student_every": 2} | overrides,
    )  # fmt: skip
    return Gaussians(cfg, mesh_lib.make_mesh(cfg.mesh))


@pytest.fixture(scope="module")
def toy():
    return objective()


def frozen(toy):
    like = toy.frozen[NEGATIVE]
    return {NEGATIVE: jax.device_put(jnp.zeros(like.shape, like.dtype), like.sharding)}


def values(network):
    """Mean, and deviation, of one network."""
    return float(network["shift"][0]), abs(float(network["scale"][0]))


def test_mean_and_variance_of_the_student_converge(toy):
    step, now = Step(toy), state.init(toy)
    batch, given = tiny_distill.batches(toy), frozen(toy)
    start = values(now.networks[STUDENT].params)
    assert abs(start[0] - MEAN) > 1 and abs(start[1] - DEVIATION) > 0.5
    path = []
    for done in range(400):
        now, _ = step.programs[step.due(done)](now, given, batch)
        if done >= 300:
            path.append(values(now.networks[STUDENT].params))
    student, critic = np.mean(path, axis=0), values(now.networks[CRITIC].params)
    np.testing.assert_allclose(student, (MEAN, DEVIATION), atol=0.06)
    np.testing.assert_allclose(critic, student, atol=0.15)
    np.testing.assert_allclose(values(now.networks[STUDENT].ema), student, atol=0.1)


@pytest.mark.parametrize("shift", [-0.5, 3.0])
def test_g_leads_to_the_data_where_the_critic_is_right(toy, shift):
    """A step against g brings the student's videos nearer to the data; at the data it is 0."""

    def g(shift, scale):
        own = {"shift": jnp.full(1, shift), "scale": jnp.full(1, scale)}
        params, batch = {STUDENT: own, CRITIC: own}, tiny_distill.batches(toy)
        return program(params, frozen(toy), jax.tree.map(lambda x: x[0], batch))

    @jax.jit
    def program(params, frozen, batch):
        moment = Moment(
            step=jnp.int32(0), key=jax.random.key(0), params=params, frozen=frozen, carried=None,
            over_step=None, batch=batch,
        )  # fmt: skip
        rows = jnp.arange(8, dtype=jnp.int32)
        draws = rollout.draw(toy.cfg, toy.mesh, jax.random.key(1), rows)
        return toy.inputs(STUDENT, moment, draws).g

    with jax.set_mesh(toy.mesh):
        away, there = np.asarray(g(shift, DEVIATION)), np.asarray(g(MEAN, DEVIATION))
    assert np.all(away * (shift - MEAN) > 0)
    assert np.abs(there).max() < 1e-3


def test_a_run_goes_on_with_the_same_bits_from_every_residue(monkeypatch, tmp_path):
    """Weights, averages, both optimisers and draws; test_dmd_run.py has whole networks."""
    own = objective(steps=6, save_every=1, keep_last=6, student_every=5)
    inputs = loop.Inputs(
        batches=lambda steps: ((tiny_distill.batches(own, i), None) for i in steps),
        frozen=frozen(own),
    )
    step = tiny_distill.CompiledOnce(own)
    tiny_distill.check_resume(step, inputs, tmp_path, monkeypatch)
