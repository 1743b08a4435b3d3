"""FP8 decoding: codes and scales by hand, error of the pictures, streams and meshes alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models import vae, vae_blocks, vae_fp8
from longlive_jax.sampling import decode

CFG = config_lib.VAE(dim=4, dec_dim=8, z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
decode_video = jax.jit(
    vae.decode_video.__wrapped__,
    static_argnums=(1, 3),
    compiler_options={"xla_backend_optimization_level": 0},
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def one(path, s):
        if path[-1] != "weight":
            return jnp.asarray(rng.uniform(0.5, 1.5, s.shape) * (path[-1] == "gamma"), jnp.float32)
        return jnp.asarray(
            np.prod(s.shape[:-1]) ** -0.5 * rng.standard_normal(s.shape), jnp.float32
        )

    spec = {k: v for k, v in vae.spec(CFG).items() if k in ("conv2", "decoder")}
    leaves = params_lib.flatten(spec)
    return params_lib.unflatten({path: one(path, s) for path, s in leaves.items()})


def latents(count, width=2, batch=1):
    shape = (batch, count, 1, width, 4)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def test_which_convolutions_are_codes(params):
    flat = params_lib.flatten(vae_fp8.quantize(params))
    codes = {path[:-1] for path in flat if path[-1] == "codes"}
    assert len(codes) == 4 * 3 * 2  # stages, blocks, convolutions
    assert all(path[:2] == ("decoder", "upsamples") and "residual" in path for path in codes)
    for path in codes:
        weight = params_lib.flatten(params)[(*path, "weight")]
        back = np.asarray(flat[(*path, "codes")], np.float32) * np.asarray(flat[(*path, "scale")])
        largest = np.abs(weight).max(axis=(0, 1, 2, 3))
        # Half a unit of three bits; of the smallest, a fixed step.
        bound = np.maximum(np.abs(weight) / 16, largest / 448 * 2.0**-10)
        assert (np.abs(back - weight) <= 1.001 * bound).all()
        np.testing.assert_allclose(np.abs(back).max(axis=(0, 1, 2, 3)), largest, rtol=1e-6)


def test_an_activation_never_exceeds_the_format():
    """All of a pixel's square in one channel is the most that the norm gives."""
    gamma = jnp.asarray([0.5, -2.0, 1.0, 1.0])
    x = 1e6 * jnp.eye(4)[None, None, None]
    for sign in (1, -1):
        normed = jax.nn.silu(vae_blocks.norm(gamma, sign * x))
        codes = vae_fp8.codes(normed, vae_fp8.step(gamma))
        assert np.isfinite(np.asarray(codes, np.float32)).all()
    assert float(jnp.max(jnp.abs(codes.astype(jnp.float32)))) > 400


def test_what_is_zero_stays_zero():
    zero = {"weight": jnp.zeros((3, 3, 3, 4, 4)), "bias": jnp.ones(4)}
    x, cache = jnp.ones((1, 1, 2, 2, 4)), jnp.zeros((1, 2, 2, 2, 4))
    for gamma in (jnp.zeros(4), jnp.ones(4)):
        conv = vae_fp8._convolution(zero)
        _, y = vae_blocks._normed_conv(conv, cache, gamma, x, None)
        np.testing.assert_array_equal(y, 1.0)


def test_a_convolution_is_its_oracle(params):
    block = params["decoder"]["upsamples"]["0"]["upsamples"]["0"]["residual"]
    conv, gamma = block["2"], block["0"]["gamma"]
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, 6, gamma.size))
    cache = jnp.zeros((1, 2, 4, 6, gamma.size))
    quantized = vae_fp8._convolution(conv)
    new, y = vae_blocks._normed_conv(quantized, cache, gamma, x, None)
    step = float(vae_fp8.step(gamma))
    codes = (np.asarray(vae_blocks.norm_silu(gamma, x)) / step).astype(vae_fp8.FORMAT)
    weight = np.asarray(quantized["codes"], np.float32) * np.asarray(quantized["scale"]) * step
    wide = {"weight": jnp.asarray(weight), "bias": conv["bias"]}
    expected_new, expected = vae_blocks.causal_conv(
        wide, cache, jnp.asarray(codes, jnp.float32), None
    )
    np.testing.assert_array_equal(new, expected_new)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_pictures_are_near_and_calls_of_any_length_agree(params):
    x, small = latents(4), vae_fp8.quantize(params)
    exact, whole = (np.asarray(decode_video(p, CFG, x, 3)) for p in (params, small))
    error = np.sqrt(np.mean((whole - exact) ** 2) / np.var(exact))
    assert 0.005 < error < 0.1
    np.testing.assert_allclose(decode_video(small, CFG, x, 1), whole, atol=2e-5, rtol=0)


def test_a_mesh_changes_nothing(params):
    x, small = latents(1, width=4, batch=2), vae_fp8.quantize(params)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=2, seq=2))
    where = mesh_lib.sharding(mesh, ("batch", None, None, "width", None))
    placed = jax.device_put(small, jax.NamedSharding(mesh, jax.P()))
    state = vae.init_decode_state(CFG, 2, 1, 4, jnp.float32, mesh)
    call = vae.decode_on_mesh(mesh, CFG, True)
    _, frames = call(placed, state, jax.device_put(x, where))
    np.testing.assert_allclose(frames, decode_video(small, CFG, x, 1), atol=2e-5, rtol=0)


def test_the_decoder_of_a_sampler_is_in_fp8_by_config(params):
    quant = config_lib.Quant(vae="fp8")
    base = config_lib.Config(vae=CFG, dtype="float32")
    cfg = config_lib.Config(vae=CFG, dtype="float32", quant=quant)
    mesh = mesh_lib.make_mesh(config_lib.Mesh())
    x, frames = jnp.asarray(latents(1)), []
    for one in (base, cfg):
        decoder = decode.Decoder(one, params, mesh)
        ((_, first),) = decoder(None, x, finish=None)
        frames.append(np.asarray(first))
    expected = decode_video(vae_fp8.quantize(params), CFG, np.asarray(x), 1)
    np.testing.assert_allclose(frames[1], expected, atol=2e-5, rtol=0)
    assert np.abs(frames[0] - frames[1]).max() > 1e-3
    with pytest.raises(InputError, match=r"quant\.vae='fp8' is for vae\.kind='wan'"):
        config_lib.Config(vae=config_lib.VAE(kind="taehv"), quant=quant)
