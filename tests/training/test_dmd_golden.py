"""One distillation step against the original's numbers (arXiv 2605.18739's trainer, float32).

Draws, weights and texts are the original's, its sigma(0) is exactly 0 as ours is.
"""

import dataclasses
import json

import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout, peft
from longlive_jax.diffusion import schedule, solvers
from longlive_jax.training.objectives.dmd import CRITIC, DIT, DMD, LORA, STUDENT, TEACHER
from tests import golden_files
from tests.training import dmd_parts
from tests.training.dmd_parts import error

MODEL = dataclasses.replace(golden_files.MODEL, num_heads=2)
ADAPTERS = lib.LoRA(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def golden():
    return golden_files.arrays("dmd_tiny")


def config(meta, lora=None, gradient="stop", **sample):
    """Without cuts the shots' sinks and RoPE offset change nothing."""
    sample = dict(steps=meta["steps"], sink_frames=8, rope_offset=8.0) | sample
    return lib.Config(
        model=MODEL,
        vae=lib.VAE(z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
        video=lib.Video(height=64, width=96, image_to_video=meta.get("i2v", False)),
        sample=lib.Sample(**sample),
        distill=lib.Distill(lora=lora or lib.LoRA(enabled=False), gradient=gradient, remat="qkv"),
        dtype="float32",
    )


def objective(cfg, kind=DMD):
    lib.validate_distillation(cfg)
    return kind(cfg, mesh_lib.make_mesh(cfg.mesh), teacher=True)


def weights(name):
    """The student's are those of the adapters' cases."""
    if name == STUDENT:
        return golden_files.transformer_params("lora_tiny")
    return golden_files.transformer_params("dmd_tiny", f"weights_{name}/")


def parts(cfg, golden, case):
    goal = objective(cfg)
    whole = {name: dmd_parts.place(goal, weights(name)) for name in (STUDENT, CRITIC, TEACHER)}
    params = {name: {DIT: whole[name]} for name in (STUDENT, CRITIC)}
    frozen = goal.freeze({TEACHER: whole[TEACHER]}, golden[f"{case}/negative"])
    return dmd_parts.Parts(goal, params, frozen)


def chunks(x):
    """[batch, latent frame, channel, h, w] -> [batch, chunk, frame, h, w, channel]."""
    x = np.moveaxis(x, 2, -1)
    return x.reshape(x.shape[0], -1, 8, *x.shape[2:])


class Case:
    """The original's arrays of a case."""

    def __init__(self, golden, name):
        self.golden, self.name = golden, name
        self.meta = json.loads(str(golden["meta"]))[name]

    def __getitem__(self, key):
        x = self.golden[f"{self.name}/{key}"]
        return chunks(x) if x.ndim == 5 and x.shape[1] == 32 else x

    def __contains__(self, key):
        return f"{self.name}/{key}" in self.golden

    def gradients(self, variant):
        start = f"{self.name}/{variant}/"
        found = {k[len(start) :]: v for k, v in self.golden.items() if k.startswith(start)}
        assert len(found) > 3
        return found

    def scripts(self, goal):
        text = self["text"].reshape(1, 4, *self["text"].shape[1:])
        image = np.moveaxis(self["image"], 2, -1) if "image" in self else None
        return dmd_parts.scripts(goal, text, first_frame=image)

    def draws(self, goal, prefix=""):
        names = (self[prefix + key] for key in ("noise", "eps", "tau"))
        return dmd_parts.draws(goal.cfg, goal.mesh, *names, self.meta[f"{prefix}exit_step"])


def in_torch(goal, gradient):
    """A gradient by the original's keys."""
    flat, result = params_lib.flatten(gradient[DIT]), {}
    for w in layout.weights(goal.specs):
        array = np.asarray(flat[w.path])
        array = array if w.layer is None else array[w.layer]
        result |= zip(w.keys, w.to_torch(array))
    return result


def check_gradient(found, expected, limit=1e-4):
    errors = {key: error(found[key], value) for key, value in expected.items()}
    assert max(errors.values()) <= limit, errors


def check(case, golden, cfg):
    """The student of a case; gives its programs, and the critic's inputs."""
    own = parts(cfg, golden, case.name)
    inputs = own.roll(case.scripts(own.goal), case.draws(own.goal))
    if "exit_x" in case:
        assert error(inputs.clip.x, case["exit_x"]) <= 1e-5
    assert error(inputs.clip.x0, case["exit_x0"]) <= 1e-5
    np.testing.assert_array_equal(inputs.clip.final, inputs.clip.x0)
    assert float(inputs.count) == case["exit_x0"].size - case.meta.get("i2v", False) * 4 * 4 * 6
    scores = own.scores(inputs)
    for name in ("fake_x0", "real_cond_x0", "real_uncond_x0"):
        if name in case:
            assert error(getattr(scores, name), case[name]) <= 5e-5, name
    if "normaliser" in case:
        assert error(scores.normaliser, case["normaliser"]) <= 2e-5
    assert error(scores.g, case["g"]) <= 1e-4
    inputs = inputs.replace(g=scores.g)
    gradient, loss, values = own.gradient(STUDENT, inputs)
    assert loss == pytest.approx(float(case["loss"]), rel=2e-5)
    assert values["rollout_difference"] <= 1e-5 * np.abs(case["exit_x0"]).max()
    check_gradient(in_torch(own.goal, gradient), case.gradients(f"grad_{cfg.distill.gradient}"))

    inputs = own.roll(case.scripts(own.goal), case.draws(own.goal, "critic_"))
    assert error(inputs.clip.x0, case["critic_x"]) <= 1e-5
    return own, inputs


def check_critic(case, own, inputs):
    gradient, loss, _ = own.gradient(CRITIC, inputs)
    assert loss == pytest.approx(float(case["critic_loss"]), rel=2e-5)
    check_gradient(in_torch(own.goal, gradient), case.gradients("critic_grad"))


@pytest.mark.slow  # test_dmd_gaussian.py has the critic's loss
def test_the_critic(golden):
    case = Case(golden, "t2v4_clean")
    check_critic(case, *check(case, golden, config(case.meta)))


def test_the_student_and_a_rollout_with_a_cut(golden):
    case = Case(golden, "t2v4_clean")
    own, _ = check(case, golden, config(case.meta))
    cut = Case(golden, "roll_cut")
    meta, sample = cut.meta, own.goal.cfg.sample
    assert (meta["sink"], meta["rope_offset"]) == (sample.sink_frames, sample.rope_offset)
    assert meta["multi_shot_sink"] == sample.multi_shot_sink and meta["steps"] == sample.steps
    noise, text = chunks(golden["roll/noise"]), golden["roll/text"][None]
    drawn = dmd_parts.draws(own.goal.cfg, own.goal.mesh, noise, noise, [[0]], meta["exit_step"])
    clip = own.roll(dmd_parts.scripts(own.goal, text, cut["cut"]), drawn).clip
    assert error(clip.x, cut["exit_x"]) <= 1e-5
    assert error(clip.x0, cut["exit_x0"]) <= 1e-5
    assert np.asarray(clip.position).tolist() == [[0, 8, 24, 32]]


@pytest.mark.slow
def test_a_gradient_through_clean_keys_and_values(golden):
    case = Case(golden, "t2v4_clean")
    check(case, golden, config(case.meta, gradient="through"))


@pytest.mark.slow
def test_an_image_to_begin_with(golden):
    case = Case(golden, "i2v2_clean")
    check_critic(case, *check(case, golden, config(case.meta)))


@pytest.mark.slow
def test_a_rollout_longer_than_the_window(golden):
    case = Case(golden, "window_clean")
    window = dict(window_frames=case.meta["window"], multi_shot_sink=False)
    assert case.meta["sink"] == 8
    check(case, golden, config(case.meta, **window))


class WholeCritic(DMD):
    """The original's critic has no adapters in this case."""

    def transformer(self, name, params, frozen):
        return frozen[CRITIC] if name == CRITIC else super().transformer(name, params, frozen)


@pytest.mark.slow
def test_adapters_over_a_base_that_is_held_once(golden):
    """Loss, and gradients by PEFT's names."""
    case = Case(golden, "lora_dmd")
    goal = objective(config(case.meta, ADAPTERS), WholeCritic)
    specs = goal.networks[STUDENT].specs[LORA]
    file = golden_files.arrays("lora_tiny")
    state = {k.removeprefix("lora_weights/"): v for k, v in file.items()}
    state = {k: v for k, v in state.items() if k.startswith(peft.PREFIX)}
    student = peft.from_peft(state, specs)
    base, teacher = (dmd_parts.place(goal, weights(name)) for name in (STUDENT, TEACHER))
    frozen = goal.freeze({"base": base, TEACHER: teacher}, golden["lora_dmd/negative"])
    frozen[CRITIC] = dmd_parts.place(goal, weights(CRITIC))
    own = dmd_parts.Parts(goal, {name: {LORA: student} for name in (STUDENT, CRITIC)}, frozen)
    inputs = own.roll(case.scripts(goal), case.draws(goal))
    assert error(inputs.clip.x0, case["exit_x0"]) <= 1e-5
    gradient, loss, _ = own.gradient(STUDENT, inputs.replace(g=own.scores(inputs).g))
    assert loss == pytest.approx(float(case["loss"]), rel=2e-5)
    check_gradient(peft.to_peft(gradient[LORA]), case.gradients("grad_stop"))


def test_the_laws_of_noise_are_the_originals(golden):
    law = {k.removeprefix("law/"): v for k, v in golden.items() if k.startswith("law/")}
    own = schedule.score_law(5.0, 20.0, 980.0)
    np.testing.assert_allclose(own.timesteps, law["t"], rtol=3e-7)
    np.testing.assert_allclose(own.sigmas, law["sigma"], rtol=3e-7)
    table = schedule.training_schedule(5.0)
    np.testing.assert_allclose(table.timesteps, law["table_t"], rtol=3e-7)
    np.testing.assert_allclose(table.sigmas, law["table_sigma"], rtol=3e-7)
    for steps in (2, 4):
        sigmas, timesteps = schedule.sampling_schedule(steps, 5.0)
        solver = solvers.solver(lib.Sample(steps=steps), lib.Video(shift=5.0))
        np.testing.assert_array_equal(timesteps, law[f"unipc{steps}_t"])
        np.testing.assert_allclose(sigmas, law[f"unipc{steps}_sigma"], rtol=3e-7)
        np.testing.assert_allclose(solver.exit_sigmas, law[f"unipc{steps}_exit_sigma"], rtol=3e-7)
