"""What of a transformer is trained: an action path, adapters beside it, on weights that stay."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models import actions, dit
from longlive_jax.training import state as state_lib
from longlive_jax.training.objectives.teacher_forcing import BASE, MODEL, TeacherForcing
from longlive_jax.training.step import Step
from tests.training import tiny

ACTIONS = lib.Actions(
    kind="module", heads=4, head_dim=8, keyboard_embed=8, window=6, layers=1, dropout=0.25
)
ADAPTERS = lib.LoRA(rank=2, alpha=4.0, targets="self_attn.qkv,ffn.0")


@functools.cache
def objective(trainable="all", mesh=lib.Mesh(), acts=True):
    cfg = tiny.config(mesh, max_grad_norm=1e6, latent_frames=8)
    own = ACTIONS if acts else lib.Actions()
    model = dataclasses.replace(cfg.model, actions=own, num_layers=1)
    cfg = dataclasses.replace(
        cfg,
        model=model,
        train=dataclasses.replace(cfg.train, trainable=trainable),
        distill=dataclasses.replace(cfg.distill, lora=ADAPTERS),
    )
    lib.validate_training(cfg)
    goal = TeacherForcing(cfg, mesh_lib.make_mesh(cfg.mesh))
    (program,) = Step(goal).programs.values()
    return goal, program


@functools.cache
def whole(fresh=False):
    """A transformer's weights, all of them drawn; fresh: but the path's, which begin as they do."""
    spec, draw = dit.spec(objective()[0].cfg.model), np.random.default_rng(0)
    tree = jax.tree.map(
        lambda s: (0.2 * draw.standard_normal(s.shape)).astype(np.float32),
        spec, is_leaf=params_lib.is_spec,
    )  # fmt: skip
    if not fresh:
        return tree
    made = params_lib.init(spec, jax.random.key(0))
    path = jax.device_get(actions.split(made, objective()[0].cfg.model)[1])
    return actions.join(tree, path)


def begin(goal, fresh=False):
    """The state, and what is frozen."""
    backbone, path = actions.split(whole(fresh), objective()[0].cfg.model)
    places = params_lib.shardings(goal.specs, goal.mesh)
    if goal.cfg.train.trainable == "all":
        tree = backbone if goal.cfg.model.actions.kind == "none" else whole(fresh)
        return state_lib.init(goal, {MODEL: jax.device_put({"dit": tree}, places)}), ()
    own = goal.init_params()[MODEL]
    own["dit"] = jax.device_put(path, places["dit"])
    place = params_lib.shardings(goal.backbone, goal.mesh)
    return state_lib.init(goal, {MODEL: own}), goal.freeze(jax.device_put(backbone, place))


def data(goal):
    draw = np.random.default_rng(1)

    def one(like):
        x = draw.standard_normal(like.shape)
        x = np.ones(like.shape, bool) if like.dtype == bool else x.astype(like.dtype)
        return jax.device_put(x, like.sharding)

    return jax.tree.map(one, goal.batch)


@functools.cache
def run(trainable, mesh=lib.Mesh(), fresh=False, acts=True, steps=2):
    """Losses; the parameters by path; what is frozen, before and after."""
    goal, program = objective(trainable, mesh, acts)
    state, frozen = begin(goal, fresh)
    before, losses, batches = jax.device_get(frozen), [], data(goal)
    for _ in range(steps):
        state, metrics = program(state, frozen, batches)
        losses.append(float(metrics.networks[MODEL].loss))
    params = params_lib.flatten(jax.device_get(state.networks[MODEL].params))
    return losses, params, before, jax.device_get(frozen)


@pytest.mark.slow
def test_a_fresh_path_on_frozen_weights_has_the_loss_of_the_plain_model():
    expected, *_ = run("all", acts=False, steps=1)
    for trainable in ("actions", "lora"):
        found, *_ = run(trainable, fresh=True, steps=1)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_path_learns_what_it_learns_in_the_whole_and_the_rest_stays():
    """One step: the gradient of the path does not depend on what else is trained."""
    expected, everything, *_ = run("all", steps=1)
    found, path, before, after = run("actions", steps=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert path and all("action_model" in place for place in path)
    for place, weight in path.items():
        np.testing.assert_allclose(weight, everything[place], atol=2e-5, err_msg="/".join(place))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    held = params_lib.flatten(before[BASE])
    assert not any("action_model" in place for place in held)  # once, and not here


@pytest.mark.slow
def test_adapters_and_the_path_learn_together():
    losses, params, before, after = run("lora")
    assert losses[1] != losses[0]
    begun = params_lib.flatten(
        jax.device_get(begin(objective("lora")[0])[0].networks[MODEL].params)
    )
    assert params.keys() == begun.keys()
    moved = {place: np.abs(params[place] - begun[place]).max() for place in params}
    assert all(moved.values()), moved
    assert {place[0] for place in params} == {"dit", "lora"}
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["actions", "lora"])
def test_a_mesh_changes_nothing(trainable):
    expected, params, *_ = run(trainable)
    found, on_mesh, *_ = run(trainable, lib.Mesh(fsdp=2, seq=2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for place, weight in params.items():
        np.testing.assert_allclose(on_mesh[place], weight, atol=5e-5, err_msg="/".join(place))


def test_the_whole_is_put_together_again():
    goal, _ = objective("lora")
    state, frozen = begin(goal)
    own = state.networks[MODEL].params
    merged = params_lib.flatten(jax.device_get(goal.whole(own, frozen)["dit"]))
    plain = params_lib.flatten(whole())
    assert merged.keys() == plain.keys()
    for place, weight in merged.items():  # B is zero
        np.testing.assert_array_equal(weight, plain[place], err_msg="/".join(place))


@pytest.mark.slow
def test_actions_that_say_what_is_shown_are_learned():
    """A latent's sign is its key. Most of the noise hides it from those who are not told the key."""
    cfg = tiny.config(
        latent_frames=8, batch_size=8, learning_rate=1e-2, beta1=0.9, beta2=0.98, max_grad_norm=1.0
    )
    own = dataclasses.replace(ACTIONS, dropout=0.0)
    model = dataclasses.replace(cfg.model, actions=own, num_layers=1)
    video = dataclasses.replace(cfg.video, shift=12.0)
    cfg = dataclasses.replace(cfg, model=model, video=video)
    goal = TeacherForcing(cfg, mesh_lib.make_mesh(cfg.mesh))
    (program,) = Step(goal).programs.values()

    def last_losses(told):
        state, batches, found = state_lib.init(goal), data(goal), []
        draw = np.random.default_rng(0)
        shape, picture = batches.latents.shape[:4], draw.standard_normal((4, 4, 4))
        for _ in range(400):
            held = draw.integers(0, 2, shape)
            acts = {name: np.zeros(x.shape) for name, x in batches.actions.items()}
            acts["keyboard"][..., 0] = held[..., None] * told
            latents = (2 * held - 1)[..., None, None, None] * picture
            new = batches.replace(latents=latents, actions=acts)
            new = jax.tree.map(
                lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding),
                new, batches,
            )  # fmt: skip
            state, metrics = program(state, (), new)
            found.append(float(metrics.networks[MODEL].loss))
        return np.mean(found[-50:])

    told, guessed = last_losses(True), last_losses(False)
    assert told < 0.4 * guessed, (told, guessed)


def test_settings_that_cannot_work_are_refused():
    cfg = tiny.config()
    train = dataclasses.replace(cfg.train, trainable="actions")
    with pytest.raises(InputError, match=r"train.trainable='actions' with actions.kind='none'"):
        lib.validate_training(dataclasses.replace(cfg, train=train))
    with pytest.raises(InputError, match=r"train.trainable='path' must be one of all, lora, act"):
        lib.Train(trainable="path")
    train = dataclasses.replace(cfg.train, trainable="lora")
    with pytest.raises(InputError, match=r"distill.lora.rank=128 must be at most model.dim=32"):
        lib.validate_training(dataclasses.replace(cfg, train=train))
    with pytest.raises(InputError, match=r"actions.keyboard_keys='KeyW' names 1 keys"):
        lib.Actions(keyboard_keys="KeyW")
