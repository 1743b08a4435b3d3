"""The action path in the whole transformer: training, streams, meshes, rows, recaching, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.errors import InputError
from longlive_jax.models import actions, dit, lora
from longlive_jax.sampling import exits, programs, stream

CHUNKS, FRAMES, SIZE = 3, 4, (4, 4)
SETTINGS = {
    "module": dict(kind="module", heads=4, head_dim=8, keyboard_embed=8, window=6, layers=1),
    "token": dict(kind="token"),
    "none": {},
}


def config(kind="module", mesh=config_lib.Mesh(), **sample):
    model = config_lib.Model(
        dim=32, ffn_dim=48, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6,
        freq_dim=16, chunk_frames=FRAMES, actions=config_lib.Actions(**SETTINGS[kind]),
    )  # fmt: skip
    window = dict(steps=2, window_frames=16, sink_frames=0, multi_shot_sink=False)
    return config_lib.Config(
        model=model,
        vae=config_lib.VAE(
            dim=8, dec_dim=8, z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4
        ),
        video=config_lib.Video(height=64, width=64),
        sample=config_lib.Sample(**window | sample),
        mesh=mesh,
        dtype="float32",
    )


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def random_params(kind):
    """Every weight drawn: those that both kinds share are equal."""
    leaves = params_lib.flatten(dit.spec(config(kind).model))

    def one(path, s):
        scale = 1.0 if len(s.shape) < 2 else s.shape[-2] ** -0.5
        weight = scale * draw(sum(map(ord, "/".join(path))), *s.shape)
        return weight + (s.init is params_lib.ones)

    return params_lib.unflatten({path: one(path, s) for path, s in leaves.items()})


def fresh_path(kind):
    """The plain model, and the action path as it begins."""
    fresh = params_lib.init(dit.spec(config(kind).model), jax.random.key(0))["blocks"]
    return {**random_params("none"), "blocks": {**fresh, **random_params("none")["blocks"]}}


VECTORS = {
    "keyboard": draw(5, 2, 4 * FRAMES * CHUNKS, 4),
    "mouse": draw(6, 2, 4 * FRAMES * CHUNKS, 2),
}


def inputs(cfg, chunk, rows=(0, 1), prompt=0):
    rows = list(rows)
    own = cfg.model.actions
    made = {
        name: jnp.asarray(actions.of_chunk(x, own, chunk, FRAMES)[rows])
        for name, x in VECTORS.items()
    }
    return stream.ChunkInput(
        noise=jnp.asarray(draw(10 + chunk, 2, FRAMES, *SIZE, 4)[rows]),
        text=jnp.asarray(draw(20 + prompt, 2, 6, 8)[rows]),
        cut=jnp.zeros(len(rows), jnp.bool_),
        actions=made if own.kind != "none" else None,
    )


@functools.cache
def sampler_of(cfg):
    return stream.sampler(cfg, mesh_lib.make_mesh(cfg.mesh))


def sample(cfg, params, **given):
    """Latents of all chunks, and the last state."""
    sampler = sampler_of(cfg)
    params, state, made = sampler.prepare(params), sampler.init_state(2, *SIZE), []
    for chunk in range(CHUNKS):
        state, latents = sampler.step(params, state, sampler.place(inputs(cfg, chunk, **given)))
        made.append(np.asarray(latents))
    return np.stack(made, 1), state


def teacher_forcing(cfg, params, clean, noisy, timesteps):
    """Velocity [batch, chunk, ...] of a video in one forward, under prompt 0."""
    own, latents = cfg.model.actions, CHUNKS * FRAMES
    numbers = jnp.arange(latents, dtype=jnp.int32).reshape(1, CHUNKS, FRAMES)
    inserted = None
    if own.kind != "none":
        windows = {
            name: actions.windows(jnp.asarray(x), own, latents).reshape(
                2, CHUNKS, 1, FRAMES, -1, x.shape[-1]
            )
            for name, x in VECTORS.items()
        }
        inserted = actions.conditioning(own, windows, numbers[:, :, None])
    text = jnp.broadcast_to(jnp.asarray(draw(20, 2, 6, 8))[:, None], (2, CHUNKS, 6, 8))
    return jax.jit(functools.partial(dit.teacher_forcing, cfg=cfg.model))(
        params, clean=jnp.asarray(clean), noisy=jnp.asarray(noisy), timesteps=jnp.asarray(timesteps),
        positions=jnp.broadcast_to(numbers, (2, CHUNKS, FRAMES)), text=text, inserted=inserted,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["module", "token"])
def test_a_fresh_path_changes_no_bit(kind):
    """In training, whose layers are a scan, and in a stream."""
    clean, noisy = (draw(s, 2, CHUNKS, FRAMES, *SIZE, 4) for s in (1, 2))
    times = np.full((2, CHUNKS, FRAMES), 700, np.float32)
    plain, grown = config("none"), config(kind)
    expected = teacher_forcing(plain, random_params("none"), clean, noisy, times)
    found = teacher_forcing(grown, fresh_path(kind), clean, noisy, times)
    np.testing.assert_array_equal(found, expected)
    expected, _ = sample(plain, random_params("none"))
    found, _ = sample(grown, fresh_path(kind))
    np.testing.assert_array_equal(found, expected)
    moved, _ = sample(grown, {**random_params(kind)})
    assert np.abs(moved - expected).max() > 1e-2  # and it is there


@pytest.mark.parametrize("kind", ["module", pytest.param("token", marks=pytest.mark.slow)])
def test_it_streams_as_it_trains(kind):
    """A stream's x0 again, by one teacher-forcing forward."""
    cfg, params = config(kind), random_params(kind)
    state = stream.init_state(cfg, 2, *SIZE)
    leave = jax.jit(functools.partial(exits.exit_chunk, cfg=cfg))
    left = []
    for chunk in range(CHUNKS):
        state, one = leave(dit.layers(params), state, inputs(cfg, chunk), jnp.int32(1))
        left.append(one)
    left = jax.tree.map(lambda *xs: np.stack(xs, 0 if xs[0].ndim == 0 else 1), *left)
    velocity = teacher_forcing(cfg, params, left.final, left.x, left.timestep)
    x0 = left.x - left.sigma[0] * np.asarray(velocity)
    assert np.abs(x0 - left.x0).max() < 1e-5 * np.abs(x0).max()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [config_lib.Mesh(fsdp=2, seq=4)])
def test_a_mesh_changes_nothing(mesh):
    expected, _ = sample(config(), random_params("module"))
    found, _ = sample(config(mesh=mesh), random_params("module"))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_rows_of_a_batch_are_streams_of_their_own():
    cfg, params = config(), random_params("module")
    both, _ = sample(cfg, params)
    sampler = sampler_of(cfg)
    prepared, state = sampler.prepare(params), sampler.init_state(2, *SIZE)
    for row in range(2):
        one = sampler.init_state(1, *SIZE)
        one, _ = sampler.step(prepared, one, sampler.place(inputs(cfg, 0, rows=[row])))
        state = sampler.insert(state, one, jnp.int32(row))
    latents = sampler.denoise(prepared, state, sampler.place(inputs(cfg, 1)))
    assert np.abs(np.asarray(latents) - both[:, 1]).max() < 1e-5 * np.abs(both).max()
    jax.tree.map(
        np.testing.assert_array_equal, sampler.take(state, jnp.int32(1)).actions, one.actions
    )


@pytest.mark.slow
def test_recaching_under_the_same_prompt_changes_nothing():
    cfg, params = config(), random_params("module")
    sampler = sampler_of(cfg)
    _, state = sample(cfg, params)
    prepared, last = sampler.prepare(params), sampler.place(inputs(cfg, CHUNKS - 1))
    expected = sampler.denoise(prepared, state, last)
    again = sampler.recache(prepared, state, last)
    np.testing.assert_allclose(sampler.denoise(prepared, again, last), expected, atol=1e-5)


@pytest.mark.slow
def test_guidance_goes_away_from_no_actions():
    """One step from an empty past: the velocity under actions, and past it."""
    params, velocities = random_params("module"), {}
    given = inputs(config(), 0)
    still = {name: jnp.zeros_like(x) for name, x in given.actions.items()}
    for name, own, scale in (
        ("given", given, 1.0),
        ("still", given.replace(actions=still), 1.0),
        ("guided", given, 3.0),
    ):
        cfg = config()
        settings = dataclasses.replace(cfg.model.actions, guidance=scale)
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, actions=settings))
        state = stream.init_state(cfg, 2, *SIZE)
        leave = jax.jit(functools.partial(exits.exit_chunk, cfg=cfg))
        _, left = leave(dit.layers(params), state, own, jnp.int32(0))
        velocities[name] = np.asarray((left.x - left.x0) / left.sigma)
    expected = velocities["given"] + 2 * (velocities["given"] - velocities["still"])
    assert np.abs(velocities["guided"] - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(velocities["guided"] - velocities["given"]).max() > 1e-2


@pytest.mark.slow
def test_a_stream_is_a_function_of_its_recent_actions():
    """The newest vector of a chunk reaches that chunk; other rows do not see it."""
    cfg, params = config(), random_params("module")
    expected, _ = sample(cfg, params)
    old = VECTORS["keyboard"].copy()
    VECTORS["keyboard"][0, 4 * FRAMES * 2 - 5] += 1  # drives the second chunk's last picture
    try:
        found, _ = sample(cfg, params)
    finally:
        VECTORS["keyboard"][:] = old
    same = (found == expected).reshape(2, CHUNKS, -1).all(-1)
    assert same.tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "training"), [("fp8", "bf16"), ("nvfp4_w4a4", "fp8_train")])
def test_recipes_remat_and_adapters_leave_it_as_it_is(recipe, training):
    """Traced: the path's weights are plain beside quantised ones, and have no adapters."""
    cfg = config()
    model = dataclasses.replace(cfg.model, dim=128, ffn_dim=256, num_heads=4)
    cfg = dataclasses.replace(
        cfg, model=model, quant=config_lib.Quant(recipe=recipe), dtype="bfloat16"
    )
    mesh, adapters = mesh_lib.make_mesh(cfg.mesh), config_lib.LoRA(rank=4)
    params, *rest = programs.step_arguments(cfg, mesh, 1, 16, 16)
    assert params["blocks"][0]["action_model"]["t_qkv"]["weight"].dtype == jnp.bfloat16
    _, latents = jax.eval_shape(stream.Sampler(cfg, mesh).step, params, *rest)
    assert latents.shape == (1, FRAMES, 16, 16, 4)
    spec = dit.spec(model)
    assert "action_model" not in lora.specs(spec, adapters)["blocks"]
    params = lora.attach(
        params_lib.abstract(spec, dtype=jnp.bfloat16),
        params_lib.abstract(lora.specs(spec, adapters), dtype=jnp.bfloat16), adapters.scale,
    )  # fmt: skip
    clean = jax.ShapeDtypeStruct((1, CHUNKS, FRAMES, *SIZE, 4), jnp.bfloat16)
    times = jax.ShapeDtypeStruct((1, CHUNKS, FRAMES), jnp.float32)
    numbers = jnp.arange(CHUNKS * FRAMES, dtype=jnp.int32).reshape(1, CHUNKS, FRAMES)
    shapes = actions.shapes(model.actions, FRAMES)
    given = {name: jnp.zeros((1, CHUNKS, 1, *shape)) for name, shape in shapes.items()}
    inserted = actions.conditioning(model.actions, given, numbers[:, :, None])
    for remat in config_lib.REMAT[::2]:
        precision = dit.Precision(recipe_lib.get(training), jnp.bfloat16)
        loss = functools.partial(
            dit.teacher_forcing, cfg=model, positions=numbers, remat=remat, precision=precision,
            inserted=inserted,
        )  # fmt: skip

        def total(params, clean, times, text, loss=loss):
            out = loss(params, clean=clean, noisy=clean, timesteps=times, text=text)
            return jnp.sum(out.astype(jnp.float32))

        text = jax.ShapeDtypeStruct((1, CHUNKS, 6, 8), jnp.bfloat16)
        gradient = jax.eval_shape(jax.grad(total), params, clean, times, text)
        assert gradient["blocks"]["action_model"]["proj_mouse"]["weight"].shape == (1, 32, 128)


def test_actions_that_do_not_fit_are_refused():
    cfg, plain = config(), config("none")
    state, params = stream.init_state(cfg, 2, *SIZE), dit.layers(random_params("module"))
    step = functools.partial(stream.chunk_step, params, cfg=cfg)
    given = inputs(cfg, 0)
    with pytest.raises(InputError, match=r"actions: none given.*keyboard \(2, 16, 4\)"):
        jax.eval_shape(step, state, given.replace(actions=None))
    short = {name: x[:, :7] for name, x in given.actions.items()}
    with pytest.raises(InputError, match=r"actions: .*\(2, 7, 4\).*takes keyboard \(2, 16, 4\)"):
        jax.eval_shape(step, state, given.replace(actions=short))
    state, params = stream.init_state(plain, 2, *SIZE), dit.layers(random_params("none"))
    with pytest.raises(InputError, match="a model without an action path"):
        jax.eval_shape(functools.partial(stream.chunk_step, params, cfg=plain), state, given)
    with pytest.raises(InputError, match=r"none given to a model with an action path.*'module'"):
        clean = np.zeros((2, CHUNKS, FRAMES, *SIZE, 4), np.float32)
        times = np.zeros((2, CHUNKS, FRAMES), np.float32)
        positions = np.zeros((1, CHUNKS, FRAMES), np.int32)
        text = np.zeros((2, CHUNKS, 6, 8), np.float32)
        velocity = functools.partial(dit.block_causal, cfg=cfg.model, positions=positions)
        jax.eval_shape(velocity, random_params("module"), latents=clean, timesteps=times, text=text)
