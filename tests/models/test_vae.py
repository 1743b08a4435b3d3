"""The VAE against the original's numbers, and against itself: streamed, sharded, restarted."""

import dataclasses
import functools
import json
import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models import vae, vae_blocks

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "vae_tiny.npz"
ROUNDING = 5e-5  # absolute, of float32 pictures whose values reach about 3
TINY = config_lib.VAE(
    dim=4, dec_dim=4, z_dim=4, latent_mean=(0.1, -0.2, 0.3, 0.0), latent_std=(0.5, 1.0, 0.8, 1.2)
)


# Compiling is most of the time of these tests; their pictures are a few pixels.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _latents(seed, count, height=1, width=1, batch=1, z_dim=4):
    shape = (batch, count, height, width, z_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _frames(seed, count, height=16, width=16, batch=1):
    shape = (batch, count, height, width, 3)
    return 2 * np.random.default_rng(seed).random(shape, np.float32) - 1


def _random(specs):
    """As `params.init`, but without compiling a generator for each of a hundred shapes."""
    rng = np.random.default_rng(0)

    def one(path, s):
        if path[-1] != "weight":
            return jnp.full(s.shape, float(path[-1] == "gamma"))
        scale = np.prod(s.shape[:-1]) ** -0.5
        return jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32)

    leaves = params_lib.flatten(specs)
    return params_lib.unflatten({path: one(path, s) for path, s in leaves.items()})


@pytest.fixture(scope="module")
def tiny():
    return _random(vae.spec(TINY))


@pytest.fixture(scope="module")
def golden():
    """(parameters by the weight rule, config, arrays with channels last)."""
    data = np.load(GOLDEN)
    sizes = json.loads(str(data["config"]))
    cfg = config_lib.VAE(
        dim=sizes["dim"],
        dec_dim=sizes["dec_dim"],
        z_dim=sizes["z_dim"],
        latent_mean=tuple(map(float, data["latent_mean"])),
        latent_std=tuple(map(float, data["latent_std"])),
    )
    leaves = {}
    for key in data.files:
        if key.startswith("weights/"):
            w, path = data[key], tuple(key.removeprefix("weights/").split("."))
            if path[-1] == "gamma":
                w = w.reshape(-1)
            elif w.ndim > 1:
                w = np.moveaxis(w, (0, 1), (-1, -2))
            leaves[path] = jnp.asarray(w)
    arrays = {
        name: jnp.moveaxis(jnp.asarray(data[name]), 1, -1)
        for name in ("video", "encoded", "latents", "decoded")
    }
    return params_lib.unflatten(leaves), cfg, arrays


# One program a number of frames, shared by the tests below.
_decode = _jit(vae.decode, static_argnames=("cfg", "first"))
_encode = _jit(vae.encode, static_argnames=("cfg", "first"))
_decode_video = _jit(vae.decode_video, static_argnums=(1, 3))
_encode_video = _jit(vae.encode_video, static_argnums=(1, 3))


def _stream(step, init, params, cfg, x, latent_size, sizes, per_latent):
    """Calls `step` on the first frame of x and then on `sizes` latents at a time."""
    state = init(cfg, x.shape[0], *latent_size, x.dtype)
    state, y = step(params, cfg, state, x[:, :1], first=True)
    outputs, start = [y], 1
    for size in sizes:
        stop = start + size * per_latent
        state, y = step(params, cfg, state, x[:, start:stop], first=False)
        outputs.append(y)
        start = stop
    assert start == x.shape[1]
    return np.concatenate(outputs, axis=1)


def _stream_decode(params, cfg, latents, sizes):
    size = latents.shape[2:4]
    return _stream(_decode, vae.init_decode_state, params, cfg, latents, size, sizes, 1)


def _stream_encode(params, cfg, frames, sizes):
    size = (frames.shape[2] // 16, frames.shape[3] // 16)
    return _stream(_encode, vae.init_encode_state, params, cfg, frames, size, sizes, 4)


# The original.


def test_spec_is_the_original_state_dict(golden):
    params, cfg, _ = golden
    expected = params_lib.flatten(vae.spec(cfg))
    actual = params_lib.flatten(params)
    assert {p: s.shape for p, s in expected.items()} == {p: w.shape for p, w in actual.items()}


def test_decode_matches_original(golden):
    params, cfg, arrays = golden
    frames = _decode_video(params, cfg, arrays["latents"], 4)
    np.testing.assert_allclose(frames, arrays["decoded"], atol=1e-4, rtol=0)


def test_encode_matches_original(golden):
    params, cfg, arrays = golden
    latents = _encode_video(params, cfg, arrays["video"], 4)
    np.testing.assert_allclose(latents, arrays["encoded"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_bfloat16_is_near_float32(golden):
    params, cfg, arrays = golden
    bf16 = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)

    def error(function, x, expected):
        actual = function(bf16, cfg, x.astype(jnp.bfloat16), 4)
        assert actual.dtype == jnp.bfloat16
        difference = np.asarray(actual.astype(jnp.float32)) - expected
        return np.linalg.norm(difference) / np.linalg.norm(expected)

    assert error(_decode_video, arrays["latents"], np.asarray(arrays["decoded"])) < 0.03
    assert error(_encode_video, arrays["video"], np.asarray(arrays["encoded"])) < 0.03


def test_full_size_spec():
    tree = vae.spec(config_lib.VAE())
    assert len(params_lib.flatten(tree)) == 196
    counts = {name: params_lib.count(part) for name, part in tree.items()}
    assert counts == {
        "encoder": 149_627_776,
        "decoder": 555_049_228,
        "conv1": 9_312,
        "conv2": 2_352,
    }
    flat = params_lib.flatten(tree)
    assert flat[("decoder", "upsamples", "0", "upsamples", "3", "time_conv", "weight")].shape == (
        (3, 1, 1, 1024, 2048)
    )
    assert all(axis is None for s in flat.values() for axis in s.axes)


def test_initial_values_keep_the_scale():
    block = vae_blocks.residual_spec(16, 16)["residual"]
    values = {
        name: spec.init(jax.random.key(0), spec.shape, jnp.float32)
        for name, spec in (*block["2"].items(), *block["0"].items())
    }
    np.testing.assert_allclose(jnp.std(values["weight"]), (27 * 16) ** -0.5, rtol=0.05)
    np.testing.assert_array_equal(values["gamma"], np.ones(16))
    np.testing.assert_array_equal(values["bias"], np.zeros(16))


# Streaming.


@pytest.fixture(scope="module")
def whole(tiny):
    """A clip and its decoding, whole, and another and its encoding."""
    latents, frames = _latents(1, 10), _frames(2, 37)
    return (
        (latents, np.asarray(_decode_video(tiny, TINY, latents, 9))),
        (frames, np.asarray(_encode_video(tiny, TINY, frames, 9))),
    )


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(sizes=st.lists(st.integers(1, 2), max_size=9).filter(lambda s: sum(s) <= 9))
def test_any_split_decodes_alike(tiny, whole, sizes):
    (latents, expected), _ = whole
    count = 1 + sum(sizes)
    actual = _stream_decode(tiny, TINY, latents[:, :count], sizes)
    assert actual.shape[1] == 1 + 4 * (count - 1)
    np.testing.assert_allclose(actual, expected[:, : actual.shape[1]], atol=ROUNDING, rtol=0)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(sizes=st.lists(st.integers(1, 2), max_size=9).filter(lambda s: sum(s) <= 9))
def test_any_split_encodes_alike(tiny, whole, sizes):
    _, (frames, expected) = whole
    count = 1 + sum(sizes)
    actual = _stream_encode(tiny, TINY, frames[:, : 1 + 4 * (count - 1)], sizes)
    assert actual.shape[1] == count
    np.testing.assert_allclose(actual, expected[:, :count], atol=ROUNDING, rtol=0)


@pytest.mark.slow
def test_groups_of_one_size_are_bit_equal(tiny):
    latents, frames = _latents(3, 6), _frames(4, 21)
    np.testing.assert_array_equal(
        _decode_video(tiny, TINY, latents, 2), _stream_decode(tiny, TINY, latents, [2, 2, 1])
    )
    np.testing.assert_array_equal(
        _encode_video(tiny, TINY, frames, 2), _stream_encode(tiny, TINY, frames, [2, 2, 1])
    )


def test_first_call_restarts_whatever_the_state_holds(tiny):
    a, b = _latents(5, 3), _latents(6, 3)
    fresh = vae.init_decode_state(TINY, 1, 1, 1, jnp.float32)

    def play(state, x):
        state, head = _decode(tiny, TINY, state, x[:, :1], first=True)
        state, tail = _decode(tiny, TINY, state, x[:, 1:], first=False)
        return state, np.concatenate([head, tail], axis=1)

    after_a, _ = play(fresh, a)
    np.testing.assert_array_equal(play(after_a, b)[1], play(fresh, b)[1])


def test_videos_of_a_batch_are_independent(tiny):
    latents = _latents(7, 3)
    pair = np.concatenate([_latents(8, 3), latents])
    np.testing.assert_allclose(
        _decode_video(tiny, TINY, pair, 2)[1:],
        _stream_decode(tiny, TINY, latents, [2]),
        atol=ROUNDING,
        rtol=0,
    )


def test_decoder_sees_38_latents_back(tiny):
    count = 41
    latents = _latents(9, count)
    latents[:, 1] = np.nan
    frames = np.asarray(_decode_video(tiny, TINY, latents, 8))
    assert frames.shape[1] == 1 + 4 * (count - 1)
    poisoned = np.isnan(frames).any(axis=(0, 2, 3, 4)).nonzero()[0]
    # Latent 1 is seen by its own frames 1..4 and last by the second frame of latent 39.
    np.testing.assert_array_equal(poisoned, np.arange(1, 4 * 39 - 3 + 2))


def test_encoder_sees_28_latents_back(tiny):
    frames = _frames(10, 4 * 31 + 1)
    frames[:, 4] = np.nan
    latents = np.asarray(_encode_video(tiny, TINY, frames, 8))
    poisoned = np.isnan(latents).any(axis=(0, 2, 3, 4)).nonzero()[0]
    # Frame 4 is the last one that latent 1 covers.
    np.testing.assert_array_equal(poisoned, np.arange(1, 1 + 28 + 1))


def test_narrow_decoder_alone_decodes():
    cfg = dataclasses.replace(TINY, dim=12, dec_dim=2)
    tree = vae.spec(cfg)
    params = _random({k: tree[k] for k in ("conv2", "decoder")})
    frames = _decode_video(params, cfg, _latents(11, 2))
    assert frames.shape == (1, 5, 16, 16, 3)
    assert np.isfinite(frames).all()
    assert 0.05 < np.std(frames) < 20  # random weights keep the scale


@pytest.mark.parametrize("dec_dim", [128, 64])
def test_light_widths(dec_dim):
    cfg = config_lib.VAE(dec_dim=dec_dim)
    tree = vae.spec(cfg)
    params = params_lib.abstract({k: tree[k] for k in ("conv2", "decoder")}, dtype=jnp.bfloat16)
    out = jax.eval_shape(
        lambda p, x: vae.decode_video(p, cfg, x, 2),
        params,
        jax.ShapeDtypeStruct((1, 6, 44, 80, 48), jnp.bfloat16),
    )
    assert out.shape == (1, 21, 704, 1280, 3)


# Width sharded over a mesh.


@pytest.fixture(scope="module")
def wide(tiny):
    """Two clips four latents wide and their decoding; two videos and their encoding."""
    latents, frames = _latents(12, 3, 1, 4, batch=2), _frames(13, 9, 16, 64, batch=2)
    return (
        (latents, _decode_video(tiny, TINY, latents, 1)),
        (frames, _encode_video(tiny, TINY, frames, 1)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seq", [1, 2, 4])
def test_sharded_whole_clip_equals_unsharded(tiny, wide, seq):
    (latents, decoded), (frames, encoded) = wide
    mesh = mesh_lib.make_mesh(config_lib.Mesh(seq=seq))
    where = mesh_lib.sharding(mesh, (None, None, None, "width", None))
    params = jax.device_put(tiny, NamedSharding(mesh, P()))

    def both(params, latents, frames):
        return (
            vae.decode_video(params, TINY, latents, 1, axis="seq"),
            vae.encode_video(params, TINY, frames, 1, axis="seq"),
        )

    mapped = jax.shard_map(
        both, mesh=mesh, in_specs=(P(), where.spec, where.spec), out_specs=where.spec
    )
    actual = _jit(mapped)(params, jax.device_put(latents, where), jax.device_put(frames, where))
    np.testing.assert_allclose(actual[0], decoded, atol=ROUNDING, rtol=0)
    np.testing.assert_allclose(actual[1], encoded, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    "make, init, which, sizes",
    [
        (vae.decode_on_mesh, vae.init_decode_state, 0, {"data": 2, "seq": 2}),
        (vae.encode_on_mesh, vae.init_encode_state, 1, {"fsdp": 2, "seq": 2}),
    ],
)
def test_streaming_on_a_mesh(tiny, wide, make, init, which, sizes):
    x, expected = wide[which]
    mesh = mesh_lib.make_mesh(config_lib.Mesh(**sizes))
    where = mesh_lib.sharding(mesh, ("batch", None, None, "width", None))
    params = jax.device_put(tiny, NamedSharding(mesh, P()))
    state = init(TINY, 2, 1, 4, jnp.float32, mesh)
    donated = state.conv_cache["head"]["2"]
    state, head = make(mesh, TINY, True)(params, state, jax.device_put(x[:, :1], where))
    assert donated.is_deleted()
    state, tail = make(mesh, TINY, False)(params, state, jax.device_put(x[:, 1:], where))
    assert tail.sharding.spec == where.spec
    actual = np.concatenate([head, tail], axis=1)
    np.testing.assert_allclose(actual, expected, atol=ROUNDING, rtol=0)


def test_mesh_that_does_not_divide_is_refused(tiny):
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=2, seq=4))
    with pytest.raises(InputError, match=r"latent width 6 .*mesh seq=4"):
        vae.init_decode_state(TINY, 2, 1, 6, jnp.float32, mesh)
    with pytest.raises(InputError, match=r"batch 3 .* data x fsdp = 2"):
        vae.init_encode_state(TINY, 3, 1, 4, jnp.float32, mesh)
    state = vae.init_decode_state(TINY, 2, 1, 6, jnp.float32)
    with pytest.raises(InputError, match=r"latent width 6 .*mesh seq=4"):
        vae.decode_on_mesh(mesh, TINY, True)(tiny, state, _latents(0, 1, 1, 6, batch=2))
    state = vae.init_encode_state(TINY, 2, 1, 6, jnp.float32)
    with pytest.raises(InputError, match=r"latent width 6 \(96 pixels\)"):
        vae.encode_on_mesh(mesh, TINY, True)(tiny, state, _frames(0, 1, 16, 96, batch=2))


# Parts.


def test_upsampling_convolution_equals_repeat_then_convolve():
    params = params_lib.init(vae_blocks.conv_spec((3, 3), 5, 7), jax.random.key(0))
    params["bias"] = jnp.arange(7.0)
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 6, 5))
    wide = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    expected = jax.lax.conv_general_dilated(
        wide.reshape(6, 8, 12, 5),
        params["weight"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).reshape(2, 3, 8, 12, 7) + jnp.arange(7.0).reshape(1, 1, 1, 1, 7)
    _, actual = vae_blocks.upsample({"resample": {"1": params}}, {}, x, first=False, axis=None)
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim, out_dim, time", [(4, 4, 2), (4, 2, 1)])
@pytest.mark.parametrize("first", [False, True])
def test_duplicate_up_is_repeated_channels_read_as_positions(dim, out_dim, time, first):
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 1 if first else 3, 2, 3, dim)))
    b, t, h, w, _ = x.shape
    y = np.repeat(x, out_dim * time * 4 // dim, axis=-1).reshape(b, t, h, w, out_dim, time, 2, 2)
    y = y.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * time, 2 * h, 2 * w, out_dim)
    actual = vae_blocks.duplicate_up(jnp.asarray(x), out_dim, time, first=first)
    np.testing.assert_array_equal(actual, y[:, time - 1 :] if first else y)


@pytest.mark.parametrize("frames, time", [(4, 1), (4, 2), (1, 2)])
def test_average_down_is_a_mean_of_positions_read_as_channels(frames, time):
    dim = 3
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, frames, 4, 6, dim)))
    y = np.pad(x, ((0, 0), (-frames % time, 0), (0, 0), (0, 0), (0, 0)))
    y = y.reshape(2, -1, time, 2, 2, 3, 2, dim).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    y = y.reshape(*y.shape[:4], dim * time, 4).mean(axis=-1)  # groups of four entries
    actual = vae_blocks.average_down(jnp.asarray(x), time)
    np.testing.assert_allclose(actual, y, atol=1e-6, rtol=0)


def test_to_uint8_rounds_and_clamps():
    steps = jnp.arange(256.0)
    x = jnp.concatenate([steps / 127.5 - 1 + 0.3 / 127.5, jnp.asarray([-7.0, 7.0])])
    np.testing.assert_array_equal(vae.to_uint8(x), [*range(256), 0, 255])
    assert vae.to_uint8(x.astype(jnp.bfloat16)).dtype == jnp.uint8


# Refusals.


@pytest.mark.parametrize("count", [2, 4, 8])
def test_encode_video_never_drops_frames(tiny, count):
    with pytest.raises(InputError, match=rf"{count} frames, must be 1 \+ a multiple of 4"):
        vae.encode_video(tiny, TINY, _frames(0, count))
    with pytest.raises(InputError, match="0 frames"):
        _encode_video(tiny, TINY, _frames(0, 0))


def test_bad_decode_input(tiny):
    state = vae.init_decode_state(TINY, 1, 1, 1, jnp.float32)

    def decode(x, params=tiny, state=state, first=False):
        vae.decode(params, TINY, state, x, first=first)

    with pytest.raises(InputError, match="2 latents in a video's first call"):
        decode(_latents(0, 2), first=True)
    with pytest.raises(InputError, match="0 latents"):
        decode(_latents(0, 0))
    with pytest.raises(InputError, match=r"\(1, 1, 1, 1, 5\): must be .* 4\]"):
        decode(_latents(0, 1, z_dim=5))
    with pytest.raises(InputError, match=r"shape \(1, 1, 1, 4\)"):
        decode(_latents(0, 1)[0])
    with pytest.raises(InputError, match="dtype int32: must be floating"):
        decode(jnp.zeros((1, 1, 1, 1, 4), jnp.int32))
    with pytest.raises(InputError, match=r"\(1, 2, 1\) .* made for \(1, 1, 1\)"):
        decode(_latents(0, 1, 2, 1))
    with pytest.raises(InputError, match="bfloat16 do not fit the state"):
        decode(jnp.zeros((1, 1, 1, 1, 4), jnp.bfloat16))
    with pytest.raises(InputError, match=r"\['decoder'\] missing"):
        decode(_latents(0, 1), params={"conv2": tiny["conv2"]})
    with pytest.raises(InputError, match="latents_per_call=0"):
        _decode_video(tiny, TINY, _latents(0, 3), 0)


def test_bad_encode_input(tiny):
    state = vae.init_encode_state(TINY, 1, 1, 1, jnp.float32)

    def encode(x, params=tiny, first=False):
        vae.encode(params, TINY, state, x, first=first)

    with pytest.raises(InputError, match="5 frames with first=False"):
        encode(_frames(0, 5))
    with pytest.raises(InputError, match="4 frames with first=True"):
        encode(_frames(0, 4), first=True)
    with pytest.raises(InputError, match="24 x 16 pixels"):
        encode(_frames(0, 4, 24, 16))
    with pytest.raises(InputError, match=r"\(1, 8, 16\) .* made for \(1, 8, 8\)"):
        encode(_frames(0, 4, 16, 32))
    with pytest.raises(InputError, match=r"\['encoder', 'conv1'\] missing"):
        encode(_frames(0, 4), params={"decoder": tiny["decoder"], "conv2": tiny["conv2"]})
