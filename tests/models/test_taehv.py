"""The small decoder against the original's numbers, and against itself: streamed and sharded."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout
from longlive_jax.errors import InputError
from longlive_jax.models import vae

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "taehv_tiny.npz"
PUBLISHED = config_lib.VAE(kind="taehv", dec_dim=64)
TINY = config_lib.VAE(
    kind="taehv", dec_dim=4, z_dim=4, latent_mean=(0.1,) * 4, latent_std=(0.5,) * 4
)
_FAST = {"xla_backend_optimization_level": 0}


def drawn(cfg):
    """The weights of the golden numbers: by NumPy, in the order of the original's sorted keys."""
    rng, spec = np.random.default_rng(0), vae.spec(cfg)
    shapes = layout.torch_shapes(spec)
    theirs = {}
    for key in sorted(key.removeprefix("decoder.") for key in shapes):
        shape = shapes["decoder." + key]
        scale = 0.7 * (2.0 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.07
        theirs["decoder." + key] = (scale * rng.standard_normal(shape)).astype(np.float32)
    leaves = {
        w.path: jnp.asarray(w.from_torch([theirs[k] for k in w.keys])) for w in layout.weights(spec)
    }
    return params_lib.unflatten(leaves)


@pytest.fixture(scope="module")
def tiny():
    return drawn(TINY)


def latents(count, width=3, batch=1, seed=2):
    shape = (batch, count, 2, width, 4)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


decode_video = functools.partial(
    jax.jit(vae.decode_video.__wrapped__, static_argnums=(1, 3), compiler_options=_FAST)
)


def test_frames_are_the_originals():
    with np.load(GOLDEN) as golden:
        frames = decode_video(drawn(PUBLISHED), PUBLISHED, golden["latents"], 2)
        np.testing.assert_allclose((frames + 1) / 2, golden["frames"], atol=2e-5, rtol=0)


def test_names_and_shapes_are_those_of_the_published_file():
    shapes = layout.torch_shapes(vae.spec(PUBLISHED))
    assert len(shapes) == 64 and sum(map(np.prod, shapes.values())) == 9_923_532
    assert shapes["decoder.1.weight"] == (256, 48, 3, 3)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.22.bias"] == (12,)
    assert "decoder.20.bias" not in shapes


@pytest.mark.parametrize("per_call", [1, 2])
def test_calls_of_any_length_give_the_same_bits(tiny, per_call):
    x = latents(5)
    whole, pieces = (decode_video(tiny, TINY, x, n) for n in (4, per_call))
    assert whole.shape == (1, 17, 32, 48, 3)
    np.testing.assert_allclose(pieces, whole, atol=1e-6, rtol=0)


def test_a_new_video_knows_nothing_of_the_state(tiny):
    x = latents(2)
    state = jax.tree.map(lambda a: a + 7, vae.init_decode_state(TINY, 1, 2, 3, jnp.float32))
    decode = jax.jit(vae.decode, static_argnums=1, static_argnames="first", compiler_options=_FAST)
    _, frames = decode(tiny, TINY, state, x[:, :1], first=True)
    np.testing.assert_allclose(frames, decode_video(tiny, TINY, x, 1)[:, :1], atol=1e-6)


def test_a_mesh_changes_nothing(tiny):
    x = latents(3, width=4, batch=2)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=2, seq=2))
    where = mesh_lib.sharding(mesh, ("batch", None, None, "width", None))
    params = jax.device_put(tiny, jax.NamedSharding(mesh, jax.P()))
    state, parts = vae.init_decode_state(TINY, 2, 2, 4, jnp.float32, mesh), []
    for some, first in ((x[:, :1], True), (x[:, 1:], False)):
        call = vae.decode_on_mesh(mesh, TINY, first)
        state, frames = call(params, state, jax.device_put(some, where))
        parts.append(np.asarray(frames))
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1), decode_video(tiny, TINY, x, 2), atol=1e-6, rtol=0
    )


def test_bad_input(tiny):
    state = vae.init_decode_state(TINY, 1, 2, 3, jnp.float32)
    with pytest.raises(InputError, match="do not fit the state"):
        vae.decode(tiny, TINY, state, jnp.zeros((1, 1, 2, 4, 4)), first=True)
    with pytest.raises(InputError, match="takes exactly 1"):
        vae.decode(tiny, TINY, state, jnp.zeros((1, 2, 2, 3, 4)), first=True)
    with pytest.raises(InputError, match="kind='taew'"):
        config_lib.VAE(kind="taew")
