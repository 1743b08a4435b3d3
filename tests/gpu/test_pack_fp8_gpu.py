"""Fresh keys and values packed by the kernels on a Hopper GPU, against their oracle there.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_pack_fp8_gpu.py
"""

import time

import jax
import jax.numpy as jnp
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.kernels import pack_fp8 as lib
from tests.kernels import test_pack_fp8 as cpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]


def chunk(rows=1):
    """k and v of a chunk of 7,040 tokens; heads differ in size."""
    x = jax.random.normal(jax.random.key(0), (2, rows, 7040, 24, 128), jnp.bfloat16)
    sizes = 1 + jnp.arange(24, dtype=jnp.bfloat16)
    return tuple(x * sizes.reshape(1, 1, 1, 24, 1))


@pytest.mark.parametrize("inputs", (cpu.normal, cpu.extremes, chunk, lambda: chunk(rows=2)))
def test_bits_are_the_oracles(inputs):
    k, v = inputs()
    assert lib.supports(k)
    cpu.check(jax.jit(lib.pack)(k, v), jax.jit(cpu.oracle)(k, v))


def test_in_a_manual_shard_map():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=1, fsdp=1, seq=1))
    k, v = cpu.normal()
    expected = jax.jit(cpu.oracle)(k, v)
    heads = jax.P(None, None, "seq")
    specs = tuple(
        x.replace(values=spec, scale=spec) for x, spec in zip(expected, (heads, jax.P(None, "seq")))
    )
    run = jax.jit(jax.shard_map(lib.pack, mesh=mesh, in_specs=(heads, heads), out_specs=specs))
    with jax.set_mesh(mesh):
        k, v = (jax.device_put(x, jax.NamedSharding(mesh, heads)) for x in (k, v))
        assert not lib.supports(k)  # outside
        assert "mosaic_gpu" in run.lower(k, v).as_text()
        result = run(k, v)
    cpu.check(result, expected)


def test_speed():
    """One layer's fresh keys and values, all heads: by the kernels, and by XLA."""
    k, v = chunk()
    for name, function in (("kernels", lib.pack), ("XLA", cpu.oracle)):
        run = jax.jit(function)
        jax.block_until_ready(run(k, v))
        start = time.perf_counter()
        for _ in range(100):
            out = run(k, v)
        jax.block_until_ready(out)
        seconds = (time.perf_counter() - start) / 100
        moved = 5 * k.nbytes  # read twice and, half of it, written, for k and for v
        print(f"\n{name}: {seconds * 1e6:.0f} us, {moved / seconds / 1e12:.2f} TB/s")
