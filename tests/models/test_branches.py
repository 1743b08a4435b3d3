"""A branch inserted into the block from outside: the recipe for a condition, followed once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models import dit
from longlive_jax.ops.linear import linear
from longlive_jax.sampling import kv_cache

MODEL = config_lib.Model(
    dim=16, ffn_dim=24, num_heads=2, num_layers=30, in_dim=4, out_dim=4, text_dim=8, text_len=4,
    freq_dim=8, chunk_frames=2,
)  # fmt: skip
SHORT = dataclasses.replace(MODEL, num_layers=3)
CHUNKS, TOKENS = 2, 2 * 2 * 2
LATENTS = (1, CHUNKS, 2, 4, 4, 4)


# What a file of its own would hold: a residual branch, here of each frame's speed.


def speed_spec(cfg):
    return {"speed": params_lib.linear(2, cfg.dim, (None, None), params_lib.zeros)}


def speed_apply(p, x, layer):
    """x + speed W; speed [batch, chunk, (copy,) frame, 1, 2]."""
    return x.add(linear(p["speed"], layer.given.inserted["speed"]))


SPEED = dit.Branch("speed", speed_spec, speed_apply, layers=15)


# A branch whose chunks see each other, so that it has a cache: attention without a norm.


def memory_spec(cfg):
    d = cfg.dim
    return {"memory": {n: params_lib.linear(d, d, (None, None)) for n in ("q", "k", "v", "o")}}


def memory_apply(p, x, layer):
    p, h = p["memory"], x.array()

    def heads(y):  # [.., token, head, head_dim]
        return y.reshape(*y.shape[:-3], -1, layer.cfg.num_heads, layer.cfg.head_dim)

    y = layer.attend("memory", *(heads(linear(p[n], h)) for n in "qkv"))
    return x.add(linear(p["o"], y.reshape(x.shape)))


def memory(layers):
    return dit.Branch("memory", memory_spec, memory_apply, layers, dit.SELF_ATTENTION.attention)


def with_branch(branch):
    return dit.insert(dit.BRANCHES, branch, before="ffn")


def draw(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(cfg, branches=dit.BRANCHES):
    """Every weight drawn, the head's too, which would begin at zero."""
    leaves, structure = jax.tree.flatten(dit.spec(cfg, branches), is_leaf=params_lib.is_spec)
    scales = [s.shape[-2] ** -0.5 if len(s.shape) > 1 else 1.0 for s in leaves]
    drawn = [
        np.float32(scale) * draw(s.shape, i) for i, (s, scale) in enumerate(zip(leaves, scales))
    ]
    return jax.tree.unflatten(structure, drawn)


CLEAN, NOISY = (draw(LATENTS, seed) for seed in (1, 2))
TEXT = draw((1, CHUNKS, MODEL.text_len, MODEL.text_dim), 3)
TIMES = np.full(LATENTS[:3], 700.0, np.float32)
POSITIONS = np.arange(CHUNKS * 2, dtype=np.int32).reshape(LATENTS[:3])
SPEEDS = draw((*LATENTS[:3], 1, 2), 4)


def train(params, cfg, **given):
    return dit.teacher_forcing(params, cfg, CLEAN, NOISY, TIMES, POSITIONS, text=TEXT, **given)


def with_chunk(cache, c):
    """The past, or each of a dict's, in which slot c is visible."""
    if isinstance(cache, dict):
        return {name: with_chunk(one, c) for name, one in cache.items()}
    return cache.replace(valid=cache.valid.at[:, c].set(True))


def stream(params, cfg, cache, inserted=lambda chunk: None, **given):
    """Velocities of all chunks, each with the clean ones before it in the cache."""
    params, found = dit.layers(params), []
    for c in range(CHUNKS):
        text = dit.text_keys_values(params, cfg, TEXT[:, c])
        given |= dict(text=text, inserted=inserted(c))
        found.append(
            dit.denoise(
                params, cfg, NOISY[:, c], TIMES[:, c], POSITIONS[:, c], cache=cache, **given
            )
        )
        slot = jnp.full((1,), c, jnp.int32)
        cache = dit.commit(
            params, cfg, CLEAN[:, c], POSITIONS[:, c], cache=cache, slot=slot, **given
        )
        cache = with_chunk(cache, c)
    return jnp.stack(found, axis=1)


def empty_past(cfg):
    window = (CHUNKS + 1) * cfg.chunk_frames
    sample = config_lib.Sample(window_frames=window, sink_frames=0, multi_shot_sink=False)
    whole = config_lib.Config(model=cfg, sample=sample, dtype="float32")
    cache = kv_cache.init(whole, 1, 1, TOKENS, cfg.num_heads)
    return kv_cache.Past(cache, jnp.zeros((1, cache.k.shape[3]), jnp.bool_))


@pytest.fixture(scope="module")
def plain():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def extended(plain):
    """The plain model's parameters, beside the branch's as they begin."""
    specs = dit.spec(MODEL, with_branch(SPEED))["blocks"]
    fresh = params_lib.init({"speed": specs["speed"]}, jax.random.key(0))
    return {**plain, "blocks": plain["blocks"] | fresh}


def test_a_zero_branch_changes_no_bit_in_training(plain, extended):
    """Two scans, over layers 0-14 and 15-29, against one."""
    branches = with_branch(SPEED)
    inserted = {"speed": SPEEDS[:, :, None]}  # for both copies
    expected = jax.jit(lambda p: train(p, MODEL))(plain)
    found = jax.jit(lambda p: train(p, MODEL, branches=branches, inserted=inserted))(extended)
    np.testing.assert_array_equal(found, expected)

    speed = jax.tree.map(lambda w: draw(w.shape, 0), extended["blocks"]["speed"])
    moved = {**extended, "blocks": extended["blocks"] | {"speed": speed}}
    other = train(moved, MODEL, branches=branches, inserted=inserted)
    assert np.abs(other - expected).max() > 1e-3  # and it is there


@pytest.mark.slow
def test_a_zero_branch_changes_no_bit_in_streaming(plain, extended):
    branches = with_branch(SPEED)
    expected = stream(plain, MODEL, empty_past(MODEL))
    found = stream(
        extended, MODEL, empty_past(MODEL), lambda c: {"speed": SPEEDS[:, c, None]},
        branches=branches,
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected)


def test_the_plain_models_parameters_stay_where_they_are():
    one, other = (params_lib.flatten(dit.spec(MODEL, b)) for b in (None, with_branch(SPEED)))
    assert {path: (s.shape, s.axes) for path, s in one.items()} == {
        path: (s.shape, s.axes) for path, s in other.items() if "speed" not in path
    }
    weight = other["blocks", "speed", "weight"]
    assert (weight.shape, weight.axes) == ((15, 2, MODEL.dim), ("layer", None, None))
    apart = dit.sampling_spec(MODEL, None, None, with_branch(SPEED))["blocks"]
    assert ["speed" in layer for layer in apart] == [True] * 15 + [False] * 15


@pytest.mark.parametrize("layers", [1, None])
def test_a_branch_with_a_cache_streams_as_it_trains(layers):
    branches = with_branch(memory(layers))
    params = random_params(SHORT, branches)
    caches = {name: empty_past(SHORT) for name in ("self_attention", "memory")}
    expected = train(params, SHORT, branches=branches)
    found = stream(params, SHORT, caches, branches=branches)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    without = train(
        {**params, "blocks": {k: v for k, v in params["blocks"].items() if k != "memory"}}, SHORT
    )
    assert np.abs(without - expected).max() > 0.01 * np.abs(expected).max()


def test_a_branch_that_cannot_be_inserted_is_refused():
    with pytest.raises(InputError, match=r"'speed' before 'head'.*self_attention, cross_attention"):
        dit.insert(dit.BRANCHES, SPEED, before="head")
    with pytest.raises(InputError, match="'speed' before 'ffn'"):
        dit.insert(with_branch(SPEED), SPEED, before="ffn")
    with pytest.raises(InputError, match=r"'speed' is in the first 15 layers.*num_layers=3"):
        dit.spec(SHORT, with_branch(SPEED))
