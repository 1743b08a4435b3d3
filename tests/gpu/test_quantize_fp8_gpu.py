"""FP8 rows by the kernel on a Hopper GPU, against their oracles there.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_quantize_fp8_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.kernels import quantize_fp8 as lib
from longlive_jax.ops import quantized
from tests.kernels import rows as cpu
from tests.kernels.test_quantize_fp8 import kinds

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]
# Of the chip's own exponential and roots, besides the order of sums.
OTHER_CODES = 1e-2


def check(function, arguments, oracle, other_codes=0.0, **how):
    """A public function, by the kernel, against the oracle."""
    result = jax.jit(lambda *x: function(*x))(*arguments)
    expected = jax.jit(oracle)(*arguments)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    cpu.check((result.values, result.scale), expected, other_codes, **how)


@pytest.mark.parametrize("n", (1024, 3072, 4096, 14336, 16384))
def test_rows(n):
    x = jax.random.normal(jax.random.key(0), (2, 37, n), jnp.bfloat16)
    assert lib.supports(x)
    check(quantized.quantize_rows, (x,), cpu.quantize)
    check(quantized.gelu_quantize_rows, (2 * x,), cpu.gelu_quantize, OTHER_CODES)


def test_rows_out_of_the_ordinary():
    x = kinds()
    check(quantized.quantize_rows, (x,), cpu.quantize, no_scale=(5, 6))
    x = x.at[3].multiply(2.0**20)
    check(quantized.gelu_quantize_rows, (x,), cpu.gelu_quantize, OTHER_CODES, no_scale=(5, 6))


@pytest.mark.parametrize("n", (1024, 3072, 6144))
def test_layer_norm(n):
    keys = jax.random.split(jax.random.key(0), 3)
    x = 3 + jax.random.normal(keys[0], (1, 2, 3, 40, n), jnp.bfloat16)
    scale, shift = (jax.random.normal(k, (1, 2, 3, 1, n)) for k in keys[1:])
    assert lib.supports(x, 1 + scale, shift)
    arguments = (x, 1 + scale, shift)
    check(quantized.layer_norm_quantize_rows, arguments, cpu.layer_norm_quantize, OTHER_CODES)
    weight, bias = (y[:1, :1, :1].astype(jnp.bfloat16) for y in (scale, shift))
    arguments = (x, weight, bias)
    check(quantized.layer_norm_quantize_rows, arguments, cpu.layer_norm_quantize, OTHER_CODES)


@pytest.mark.parametrize("case, tiling", [(c, t) for c in lib.TILINGS for t in lib.TILINGS[c]])
def test_every_tiling(case, tiling):
    x = jax.random.normal(jax.random.key(0), (880, 6144), jnp.bfloat16)
    if case == "normed":
        weight, bias = jax.random.normal(jax.random.key(1), (2, 1, 6144))
        result = jax.jit(lambda *x: lib.kernel(*x, tiling=tiling))(x, weight, bias)
        cpu.check(result, jax.jit(cpu.layer_norm_quantize)(x, weight, bias), OTHER_CODES)
        return
    x = x if case == "long" else x[:, :3072]
    cpu.check(jax.jit(lambda x: lib.kernel(x, tiling=tiling))(x), cpu.quantize(x))
    result = jax.jit(lambda x: lib.kernel(x, activation="gelu", tiling=tiling))(x)
    cpu.check(result, jax.jit(cpu.gelu_quantize)(x), OTHER_CODES)


def test_in_a_manual_shard_map():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=1, fsdp=1, seq=1))
    x = jax.random.normal(jax.random.key(0), (1, 1, 8, 40, 3072), jnp.bfloat16)
    spec = jax.P(None, None, "seq")
    run = jax.shard_map(quantized.quantize_rows, mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, spec))
        assert not lib.supports(x)  # outside
        assert "mosaic_gpu" in jax.jit(run).lower(x).as_text()
        result = jax.jit(run)(x)
    expected = cpu.quantize(np.asarray(x))
    cpu.check((result.values, result.scale), expected)
