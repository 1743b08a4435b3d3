"""The KV cache in FP8 and in NVFP4."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.formats import quantize_fp8, quantize_nvfp4
from longlive_jax.kernels import attention_fp8
from longlive_jax.sampling import programs, stream
from tests.sampling import test_program, test_stream

FORMATS = ["fp8", "nvfp4"]
SLOW_FP8 = pytest.param("fp8", marks=pytest.mark.slow)
SIZE = test_stream.SIZE
# Eight heads of 16.
MODEL = dataclasses.replace(test_stream.MODEL, dim=128)


def make_config(kv, all_to_all="bf16", **others):
    cfg = test_stream.make_config(**others)
    quant = config_lib.Quant(kv=kv, all_to_all=all_to_all)
    return dataclasses.replace(cfg, model=MODEL, quant=quant)


@functools.cache
def random_params():
    return test_stream.draw_params(MODEL)


@functools.cache
def sampler_of(cfg):
    sampler = stream.Sampler(cfg, mesh_lib.make_mesh(cfg.mesh))
    return sampler, sampler.prepare(random_params())


@functools.cache
def run(cfg, chunks, batch=1, cuts=(), samples=None):
    """The state after so many chunks, and their latents."""
    sampler, params = sampler_of(cfg)
    inputs = test_stream.make_inputs(cfg, chunks, batch, cuts, samples=samples)
    state = sampler.init_state(batch, *SIZE)
    latents = []
    for current, chunk in test_stream.steps(sampler, params, state, inputs):
        state = current
        latents.append(np.asarray(chunk))
    return state, np.concatenate(latents, axis=1)


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kv", ["nvfp4", SLOW_FP8])
def test_the_cache_holds_each_chunk_quantised_once(kv):
    """Of the first layer of a given chunk: no attention comes before it in any format."""
    caches = {}
    for name in ("bf16", kv):
        cfg = make_config(name)
        sampler, params = sampler_of(cfg)
        given = sampler.place(test_stream.make_inputs(cfg, 1)[0])
        caches[name] = test_stream.ingest(
            sampler, params, sampler.init_state(1, *SIZE), given
        ).cache
    for table in ("k", "v"):
        chunk = np.asarray(getattr(caches["bf16"], table))[0, 0, 0, 0]  # [token, head, head_dim]
        stored = getattr(caches[kv], table)[0, 0, 0, 0]
        if kv == "nvfp4":
            expected = quantize_nvfp4(chunk)
            np.testing.assert_array_equal(stored.codes(), expected.codes())
            np.testing.assert_array_equal(*(np.asarray(q.scales) for q in (stored, expected)))
            assert stored.amax == expected.amax
            continue
        unpack = attention_fp8.unpack_keys if table == "k" else attention_fp8.unpack_values
        values = unpack(stored.values)
        for head in range(MODEL.num_heads):
            expected = quantize_fp8(chunk[:, head])
            np.testing.assert_array_equal(values[:, head], expected.values)
            assert stored.scale.reshape(-1)[head] == expected.scale


@pytest.mark.parametrize(
    "kv, limit", [pytest.param("fp8", 0.02, marks=pytest.mark.slow), ("nvfp4", 0.06)]
)
def test_the_error_is_that_of_the_format(kv, limit):
    """Over six chunks with a cut: the window is full, and slots are overwritten."""
    exact = run(make_config("bf16"), 6, cuts=(2,))[1]
    quantised = run(make_config(kv), 6, cuts=(2,))[1]
    chunk = MODEL.chunk_frames
    if kv == "nvfp4":  # nothing is read back yet; FP8 is what attention multiplies in
        assert np.array_equal(quantised[:, :chunk], exact[:, :chunk])
    assert 0 < error(quantised[:, chunk:], exact[:, chunk:]) < limit


MESHES = [{"seq": 2}, {"seq": 8}, {"data": 2, "fsdp": 2, "seq": 2}]
QUICK = [("nvfp4", MESHES[0])]


@pytest.mark.parametrize(
    "kv, mesh",
    [
        pytest.param(kv, mesh, marks=() if (kv, mesh) in QUICK else pytest.mark.slow)
        for kv in FORMATS
        for mesh in MESHES
    ],
    ids=str,
)
def test_the_mesh_changes_nothing(kv, mesh):
    """But for sums in another order, which now and then round to another code."""
    mesh = config_lib.Mesh(**mesh)
    batch = mesh.data * mesh.fsdp
    one = run(make_config(kv), 3, batch)
    many = run(make_config(kv, mesh=mesh), 3, batch)
    assert error(many[1], one[1]) < 1e-3
    for a, b in zip(*(jax.tree.leaves(state.cache) for state, _ in (many, one))):
        same = np.asarray(a).astype(np.float32) == np.asarray(b).astype(np.float32)
        assert same.mean() > 0.99 or a.dtype == np.float32  # scales have all their bits
    if kv == "nvfp4":
        np.testing.assert_allclose(many[0].cache.k.amax, one[0].cache.k.amax, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["nvfp4", SLOW_FP8])
def test_videos_of_a_batch_do_not_touch(kv):
    cfg = make_config(kv)
    together = run(cfg, 3, 2, cuts=(2,), samples=(0, 1))[1]
    alone = run(cfg, 3, cuts=(2,), samples=(1,))[1]
    assert error(together[1:], alone) < 1e-3


@pytest.mark.slow
def test_guidance_has_two_branches_in_the_cache():
    cfg = make_config("nvfp4", guidance_scale=3.0)
    state, latents = run(cfg, 2)
    assert state.cache.k.shape[1] == 2
    assert not np.array_equal(state.cache.k.codes()[:, 0], state.cache.k.codes()[:, 1])
    exact = run(dataclasses.replace(cfg, quant=config_lib.Quant()), 2)[1]
    assert 0 < error(latents, exact) < 0.1


@pytest.mark.parametrize("kv", ["nvfp4", SLOW_FP8])
def test_streaming_equals_offline_to_the_bit(kv):
    cfg = make_config(kv)
    sampler, params = sampler_of(cfg)
    stacked = jax.tree.map(lambda *x: np.stack(x), *test_stream.make_inputs(cfg, 3))
    rolled = sampler.rollout(params, sampler.init_state(1, *SIZE), sampler.place(stacked))
    state, latents = run(cfg, 3)
    np.testing.assert_array_equal(np.concatenate(np.asarray(rolled[1]), axis=1), latents)
    for a, b in zip(*(jax.tree.leaves(s) for s in (rolled[0], state))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kv, share", [("fp8", 0.5), ("nvfp4", 72 / 256)])
def test_bytes_at_full_size(kv, share):
    def size(kv):
        cfg = config_lib.Config(quant=config_lib.Quant(kv=kv))
        cache = jax.eval_shape(lambda: stream.init_state(cfg, 1, 44, 80)).cache
        # JAX says of a 4-bit float that it has a byte; on a device two share one.
        bits = [4 if x.dtype == "float4_e2m1fn" else 8 * x.dtype.itemsize for x in
                jax.tree.leaves((cache.k, cache.v))]  # fmt: skip
        return sum(b * x.size for b, x in zip(bits, jax.tree.leaves((cache.k, cache.v)))) // 8

    assert size(kv) / size("bf16") == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("kv", FORMATS)
def test_the_state_is_updated_in_place(kv):
    cfg = make_config(kv)
    sampler, params = sampler_of(cfg)
    state = sampler.init_state(1, *SIZE)
    inputs = sampler.place(test_stream.make_inputs(cfg, 1)[0])
    memory = sampler.step.lower(params, state, inputs).compile().memory_analysis()
    held = sum(x.nbytes // (2 if x.dtype == "float4_e2m1fn" else 1) for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= held


@pytest.mark.slow
def test_devices_can_exchange_codes():
    mesh = config_lib.Mesh(seq=4)
    one, sent = run(make_config("nvfp4"), 3), run(make_config("nvfp4", "nvfp4", mesh=mesh), 3)
    assert 0 < error(sent[1], one[1]) < 0.15


@pytest.mark.slow
def test_codes_that_arrive_are_those_that_one_device_stores():
    """Of the first layer, which no attention comes before."""
    tables = []
    for cfg in (
        make_config("nvfp4"),
        make_config("nvfp4", "nvfp4", mesh=config_lib.Mesh(seq=4)),
    ):
        sampler, params = sampler_of(cfg)
        given = sampler.place(test_stream.make_inputs(cfg, 1)[0])
        state = test_stream.ingest(sampler, params, sampler.init_state(1, *SIZE), given)
        tables.append(jax.tree.map(lambda x: np.asarray(x)[0, 0, 0, 0], state.cache.v))
    a, b = tables
    np.testing.assert_allclose(a.amax, b.amax, rtol=1e-6)
    assert (a.values == b.values).mean() > 0.999 and (a.scales == b.scales).mean() > 0.999


def test_bytes_that_devices_exchange():
    def sent(payload):
        cfg = config_lib.Config(
            mesh=config_lib.Mesh(seq=4), quant=config_lib.Quant(all_to_all=payload)
        )
        mesh = mesh_lib.make_mesh(cfg.mesh)
        arguments = programs.step_arguments(cfg, mesh, 1, 44, 80)
        jaxpr = stream.Sampler(cfg, mesh).step.trace(*arguments).jaxpr
        return sum(
            times * sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
            for times, equation in test_program.equations(jaxpr)
            if test_program.is_collective(equation)
        )

    assert sent("nvfp4") / sent("bf16") < 0.2815  # 72 bytes for 256, and the magnitudes


def test_bad_settings():
    with pytest.raises(InputError, match=r"quant\.all_to_all='fp8' must be one of bf16, nvfp4"):
        make_config("bf16", "fp8")
    with pytest.raises(InputError, match=r"quant\.kv='int8' must be one of bf16, fp8, nvfp4"):
        make_config("int8")
    with pytest.raises(InputError, match="num_heads=8 must be a multiple of numbers a block=16"):
        payload = config_lib.Quant(all_to_all="nvfp4")
        dataclasses.replace(test_stream.make_config(), model=test_stream.MODEL, quant=payload)
