"""The product with NVFP4 weights by the kernel on a Hopper GPU, against the CPU's oracles.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_matmul_nvfp4_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.kernels import matmul_nvfp4 as lib
from longlive_jax.kernels import matmul_nvfp4_hopper as hopper
from tests.kernels import test_matmul_nvfp4 as cpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]
DTYPES = (jnp.float32, jnp.bfloat16)


def run(args, dtype, tuning=lib.TUNING):
    return jax.jit(lambda *x: lib.kernel(*x, dtype, tuning))(*args)


def test_every_code_and_scale():
    """Exactly: each sum has one term that is not 0."""
    codes, scales = cpu.every_code_and_scale()
    x = jnp.eye(256, dtype=jnp.bfloat16)
    y = run((x, codes, scales), jnp.float32)
    expected = cpu.weights(codes, scales).T
    np.testing.assert_array_equal(np.asarray(y).astype(np.float64), expected)
    np.testing.assert_array_equal(run((x, codes, scales), jnp.bfloat16).astype(jnp.float32), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(
    "shape", [(128, 64, 256), (7040, 256, 512), (384, 3072, 768), (256, 14336, 256)], ids=str
)
def test_product(shape, dtype):
    args = cpu.inputs(*shape)
    cpu.check(run(args, dtype), cpu.expected(*args), dtype)


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
@pytest.mark.parametrize("group", [1, 5, 12])
def test_every_schedule(stages, group):
    """To the bit the same, and the same each time."""
    args = cpu.inputs(1920, 1024, 2560)
    expected = run(args, jnp.bfloat16)
    cpu.check(expected, cpu.expected(*args), jnp.bfloat16)
    tuning = hopper.Tuning(stages=stages, group=group)
    for _ in range(3):
        np.testing.assert_array_equal(run(args, jnp.bfloat16, tuning), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_tensor(dtype):
    """The public function: three parts, leading axes, and rows that tiles do not divide."""
    x, codes, scales = cpu.inputs(1280, 512, 768)
    w = cpu.tensor(codes, scales, parts=3)
    expected = cpu.expected(x, codes, scales)
    assert lib.supports(x, w)
    y = jax.jit(lib.matmul, static_argnums=2)(x.reshape(2, 5, 128, 512), w, dtype)
    cpu.check(y.reshape(1280, 768), expected, dtype)
    assert not lib.supports(x[:37], w)
    y = jax.jit(lib.matmul, static_argnums=2)(x[:37], w, dtype)
    cpu.check(y, expected[:37], dtype)


def test_in_a_manual_shard_map():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=1, fsdp=1, seq=1))
    x, codes, scales = cpu.inputs(256, 256, 512)
    w = cpu.tensor(codes, scales)
    expected = cpu.expected(x, codes, scales)
    everywhere = jax.P()
    f = jax.shard_map(
        lib.matmul, mesh=mesh, in_specs=(jax.P("seq"), everywhere), out_specs=jax.P("seq")
    )
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("seq")))
        assert not lib.supports(x, w)  # outside
        assert "mosaic_gpu" in jax.jit(f).lower(x, w).as_text()
        y = jax.jit(f)(x, w)
    cpu.check(y, expected)
