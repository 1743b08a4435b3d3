"""The finite flag of a chunk, and what it says of the cause."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import networks
from longlive_jax.errors import InputError, NotFiniteError
from longlive_jax.files.arrays import narrow
from longlive_jax.models import vae
from longlive_jax.sampling import decode, finite
from longlive_jax.sampling.session import Engine, Session, Start
from tests.sampling import test_session, test_stream

CFG = test_stream.make_config(vae_latents_per_call=8)
SHAPE = 1, 16, *test_session.SIZE, test_stream.MODEL.in_dim


def steps(engine=None, texts=None, **start):
    height, width = test_session.SIZE
    engine = engine or test_session.engine_of(CFG)
    texts = texts or test_session.Texts(CFG.model)
    session = Session(engine, texts, Start(height=height, width=width, **start))
    session.prompt("a")
    return session


def spoil(tree, path, value=np.nan):
    """The tree with one value of one array replaced."""

    def one(name, x):
        if jax.tree_util.keystr(name, simple=True, separator="/") != path:
            return x
        return x.at[(0,) * x.ndim].set(value)

    return jax.tree.map_with_path(one, tree)


@pytest.mark.slow
def test_what_is_finite_says_so():
    chunk = steps().step()
    assert chunk.finite.shape == () and chunk.finite.dtype == bool and bool(chunk.finite)
    np.testing.assert_array_equal(chunk.largest, np.abs(chunk.latents).max())
    chunk.check()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whole", [True, False])
def test_noise(value, whole):
    noise = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    noise[0, 9, 0, 0, 0] = value
    session = steps(noise=noise, whole=whole)
    session.step().check()
    chunk = session.step()
    with pytest.raises(NotFiniteError, match=r"^chunk 1 is not finite.*the given noise is not fin"):
        chunk.check()


@pytest.mark.parametrize("name", ["past", "first_frame"])
def test_latents_to_begin_with(name):
    latents = np.zeros((1, 8 if name == "past" else 1, *SHAPE[2:]), np.float32)
    latents[0, 0, 1, 1, 1] = np.inf
    with pytest.raises(NotFiniteError, match=f"chunk 0 .*the given {name} is not finite"):
        steps(**{name: latents}).step().check()


def test_texts():
    class Bad(test_session.Texts):
        def __call__(self, prompts):
            rows = super().__call__(prompts)
            rows[0, 0, 0] = np.nan
            return rows

    with pytest.raises(NotFiniteError, match=r"chunk 0 .*the embedding of 'a' is not finite"):
        steps(texts=Bad(CFG.model)).step().check()


def test_weights():
    engine = test_session.engine_of(CFG)
    paths = [p for p in names(engine.params) if "bias" in p]
    for path in (paths[0], paths[-1]):
        bad = dataclasses.replace(engine, params=spoil(engine.params, path))
        with pytest.raises(NotFiniteError, match=f"weights of the transformer .*: {path}"):
            steps(bad).step().check()


def names(tree):
    flat, _ = jax.tree.flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]


def test_a_decoder_whose_last_bias_is_not_finite():
    """The latents are finite, and the frames are not before they are rounded."""
    engine = test_session.engine_of(CFG)
    (path,) = [p for p in names(engine.decoder.params) if p == "decoder/head/2/bias"]
    decoder = decode.Decoder(CFG, spoil(engine.decoder.params, path), engine.mesh)
    chunk = steps(dataclasses.replace(engine, decoder=decoder)).step()
    assert np.isfinite(chunk.latents).all() and not bool(chunk.finite)
    with pytest.raises(NotFiniteError, match=f"weights of the VAE .*: {path}"):
        chunk.check()


def test_without_a_decoder():
    engine = test_session.engine_of(CFG, decodes=False)
    noise = np.full(SHAPE, np.nan, np.float32)
    assert bool(steps(engine).step().finite)
    assert not bool(steps(engine, noise=noise).step().finite)


@pytest.mark.slow
def test_a_decoder_on_a_device_of_its_own():
    engine = test_session.engine_of(CFG)
    mesh = mesh_lib.make_mesh(CFG.mesh, jax.devices()[1:2])
    decoder = decode.Decoder(CFG, jax.device_get(engine.decoder.params), mesh)
    apart = dataclasses.replace(engine, decoder=decoder)
    steps(apart).step().check()
    noise = np.full(SHAPE, np.nan, np.float32)
    assert not bool(steps(apart, noise=noise).step().finite)


@pytest.mark.slow
def test_frames_are_those_without_the_flag():
    """To the bit: the flag is beside the rounding, not in it."""
    draw = np.random.default_rng(0)
    specs = {k: tree for k, tree in vae.spec(CFG.vae).items() if k in networks.DECODER}
    weights = jax.tree.map(
        lambda s: 0.1 * draw.standard_normal(s.shape, np.float32), specs,
        is_leaf=params_lib.is_spec,
    )  # fmt: skip
    decoder = decode.Decoder(CFG, weights, mesh_lib.make_mesh(CFG.mesh))
    latents = draw.standard_normal(SHAPE, np.float32)
    plain = [x for _, x in decoder(None, latents, finish=vae.to_uint8)]
    flagged = [x for _, x in decoder(None, latents)]
    for a, b in zip(plain, flagged, strict=True):
        np.testing.assert_array_equal(a, b.frames)
        assert bool(b.finite)


def test_senseless_latents_are_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(logging, "log_first_n", lambda *args: told.append(args[1] % args[3:]))
    finite.warn_of_latents("chunk 3", jnp.float32(finite.MOST_LATENT))
    assert not told
    finite.warn_of_latents("chunk 3", jnp.float32(1e30))
    assert told[0].startswith("chunk 3: latents up to 1e+30, where a video's stay below 100")


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_weights_of_any_format_are_looked_at(dtype):
    good = {"a": jnp.ones((3, 4), dtype), "n": jnp.arange(3), "b": {"c": jnp.zeros(2, dtype)}}
    assert params_lib.not_finite(good) == []
    bad = good | {"b": {"c": jnp.asarray([0, np.nan], dtype)}}
    assert params_lib.not_finite(bad) == ["b/c"]


class Trained:
    """A training run whose weights have these values."""

    step = 50

    def __init__(self, value):
        self.value = value

    def load(self, part, tree, mesh, dtype, rules, weights):
        return {"head": {"bias": jnp.asarray([0, self.value], dtype)}}


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_weights_of_a_run_are_refused_by_name(monkeypatch, value):
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    monkeypatch.setattr(networks, "_grown", lambda checkpoint, part: None)
    monkeypatch.setattr(networks, "_trained", lambda checkpoint, part: Trained(value))
    with pytest.raises(InputError, match=r"RUN: dit/head/bias of its latest weights .* step 50"):
        networks.load("RUN", "dit", cfg, mesh_lib.make_mesh(cfg.mesh), weights="latest")
    monkeypatch.setattr(networks, "_trained", lambda checkpoint, part: Trained(1.0))
    networks.load("RUN", "dit", cfg, mesh_lib.make_mesh(cfg.mesh))


@pytest.mark.parametrize(
    "array, dtype",
    [
        (np.array([1e300, 0]), np.float32),
        (np.array([0, -3.5e38]), np.float32),
        (np.array([3.4e38], np.float32), jnp.bfloat16),
        (np.array([70000.0]), np.float16),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused(array, dtype):
    with pytest.raises(InputError, match=r"^x: .* is infinite in .*, as are 1 of"):
        narrow(array, dtype, "x")


def test_what_it_can_hold_is_cast():
    for array in (np.array([3.4028234e38]), np.array([1, 2]), np.array([1e-300]), np.zeros((0, 3))):
        np.testing.assert_array_equal(narrow(array, np.float32, "x"), array.astype(np.float32))


def test_a_prompt_encoder_and_engine_without_guidance_have_causes():
    assert finite.cause({}, {"x": None, "y": np.ones(2)}, "other") == "other"
    assert finite.cause({}, {"y": np.array([np.nan])}, "other") == "y is not finite"
    assert isinstance(test_session.engine_of(CFG), Engine)
