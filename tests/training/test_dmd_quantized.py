"""Distillation in quantised recipes: the base of each recipe is there once, and steps are taken."""

import jax
import numpy as np
import pytest

from longlive_jax import params as params_lib
from longlive_jax.formats import Quantized
from longlive_jax.quant.adapted import Adapted
from longlive_jax.training import state
from longlive_jax.training.objectives.dmd import BASE, CRITIC, NEGATIVE, STUDENT, TEACHER
from longlive_jax.training.step import Step
from tests.training import tiny_distill

RECIPE = "nvfp4_dmd"


@pytest.fixture(scope="module")
def quantized():
    cfg = tiny_distill.config(
        model=dict(ffn_dim=64), quant=dict(recipe=RECIPE), teacher_recipe=RECIPE, steps=2,
        student_every=2,
    )  # fmt: skip
    return tiny_distill.begin(cfg)


def weight(tree):
    return tree["blocks"]["self_attn"]["qkv"]["weight"]


def test_weights_that_are_equal_are_held_once(quantized):
    goal, params, frozen = quantized
    assert set(frozen) == {BASE, NEGATIVE} and set(frozen[BASE]) == {RECIPE, "bf16"}
    like = jax.tree.map(lambda x: (x.shape, x.dtype), goal.frozen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), frozen) == like
    student, teacher, critic = (
        weight(goal.transformer(name, params, frozen)) for name in (STUDENT, TEACHER, CRITIC)
    )
    assert isinstance(teacher, Quantized) and teacher is weight(frozen[BASE][RECIPE])
    assert isinstance(student, Adapted) and isinstance(critic, Adapted)
    pairs = ((student.base, teacher), (critic.base, weight(frozen[BASE]["bf16"])))
    for ours, held in pairs:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(held), strict=True):
            assert a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()


def test_a_teacher_of_its_own_is_beside_the_base():
    goal, params, frozen = tiny_distill.begin(tiny_distill.config(), teacher=True)
    assert set(frozen) == {BASE, TEACHER, NEGATIVE}
    assert weight(goal.transformer(TEACHER, params, frozen)) is weight(frozen[TEACHER]["bf16"])
    assert np.any(weight(frozen[TEACHER]["bf16"]) != weight(frozen[BASE]["bf16"]))


def test_whole_networks_hold_the_teacher_alone():
    goal, params, frozen = tiny_distill.begin(tiny_distill.config(lora=tiny_distill.WHOLE))
    assert set(frozen) == {TEACHER, NEGATIVE}
    assert goal.transformer(STUDENT, params, frozen) is params[STUDENT]["dit"]


@pytest.mark.slow  # minutes, for XLA's CPU compiler
def test_a_step_of_student_and_teacher_in_nvfp4(quantized):
    goal, params, frozen = quantized
    step, now = Step(goal), state.init(goal, jax.tree.map(lambda x: x.copy(), params))
    before = jax.device_get(params)
    now, metrics = step.programs[step.due(0)](now, frozen, tiny_distill.batches(goal))
    assert list(np.asarray(metrics.bad)) == [0, 0]
    student = metrics.networks[STUDENT]
    assert np.isfinite(student.loss) and np.isfinite(metrics.networks[CRITIC].loss)
    # The sampler's and the trainer's kernels round apart: reported, near, not equal.
    assert 0 < float(student.values["rollout_difference"]) < 2
    for name in (STUDENT, CRITIC):
        after = params_lib.flatten(jax.device_get(now.networks[name].params))
        for path, leaf in params_lib.flatten(before[name]).items():
            assert np.any(after[path] != leaf), path
