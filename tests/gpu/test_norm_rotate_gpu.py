"""Norm and rotation of queries and keys by the kernel on a Hopper GPU, against XLA's there.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_norm_rotate_gpu.py
"""

import functools
import time

import jax
import jax.numpy as jnp
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.kernels import norm_rotate as lib
from longlive_jax.ops import rotated
from tests.kernels import test_norm_rotate as cpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]
DIM = 3072


@pytest.mark.parametrize("tokens", (880, 440, 220))
def test_it_is_the_composition(tokens):
    x = cpu.arguments((1, 1, 8, tokens), DIM)
    assert lib.supports(*x)
    shares = cpu.check(jax.jit(rotated.norm_rotate)(*x), cpu.composed(*x))
    print(f"\n{8 * tokens} tokens: other numbers in q and k: {shares}")


@pytest.mark.parametrize("dim", (1024, DIM, 6144))
def test_of_a_product(dim):
    x = cpu.product((1, 1, 8, 110), dim)
    assert lib.supports(*x)
    shares = cpu.check(jax.jit(rotated.norm_rotate)(*x), cpu.composed(*x), cpu.OTHERS)
    print(f"\ndim {dim}: other numbers in q, k and v: {shares}")


@pytest.mark.parametrize("dim", (1024, 2048, 4096, 6144))
def test_other_widths(dim):
    x = cpu.arguments((2, 37), dim, jnp.float32)
    assert lib.supports(*x)
    cpu.check(jax.jit(rotated.norm_rotate)(*x), cpu.composed(*x))


def test_rows_out_of_the_ordinary():
    x = cpu.extremes(DIM)
    cpu.check(jax.jit(rotated.norm_rotate)(*x), cpu.composed(*x))


def test_in_a_manual_shard_map():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=1, fsdp=1, seq=1))
    x = cpu.arguments((1, 1, 8, 40), DIM)
    specs = (jax.P(None, None, "seq"), jax.P(), jax.P(), jax.P(None, None, "seq"))
    run = jax.shard_map(rotated.norm_rotate, mesh=mesh, in_specs=specs, out_specs=specs[0])
    with jax.set_mesh(mesh):
        placed = [jax.device_put(y, jax.NamedSharding(mesh, s)) for y, s in zip(x, specs)]
        assert not lib.supports(*placed)  # outside
        assert "mosaic_gpu" in jax.jit(run).lower(*placed).as_text()
        result = jax.device_get(jax.jit(run)(*placed))
    cpu.check(tuple(map(jnp.asarray, result)), cpu.composed(*x))


@pytest.mark.parametrize("tokens", (880, 440))
def test_speed(tokens):
    """Prints microseconds a layer, and what reading and writing qkv once makes of them."""
    qkv, *shared = cpu.arguments((1, 1, 8, tokens), DIM)
    layers = [qkv * (1 + i) for i in range(8)]  # cosines and sines are made once for all
    for name, f in (("kernel", rotated.norm_rotate), ("XLA", rotated.composed)):
        us = microseconds(lambda xs, shared, f=f: [f(x, *shared) for x in xs], layers, shared)
        print(f"\n{8 * tokens} tokens, {name}: {us:.1f} us, {4 * qkv.size / us / 1e6:.2f} TB/s")


def microseconds(f, layers, shared):
    """A layer, of several in a program: launches do not count."""
    run = functools.partial(jax.jit(f), layers, shared)
    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(20):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / 20 / len(layers) * 1e6
