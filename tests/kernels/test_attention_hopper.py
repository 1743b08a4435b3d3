"""What bfloat16 and FP8 attention share: when the kernel is taken, and where on a mesh."""

import functools

import jax
import jax.numpy as jnp
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.kernels import attention_bf16, attention_fp8
from tests.kernels import test_attention_bf16, test_attention_fp8
from tests.kernels.checks import pretend_hopper

LIBS = {
    "bfloat16": (attention_bf16, test_attention_bf16),
    "fp8": (attention_fp8, test_attention_fp8),
}


@pytest.mark.parametrize("lib", [lib for lib, _ in LIBS.values()], ids=LIBS)
def test_what_is_supported(monkeypatch, lib):
    def q(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    chunk = q(1, 7040, 24, 128)
    assert not lib.supports(chunk, 7040)
    pretend_hopper(monkeypatch)
    assert lib.supports(chunk, 7040) and lib.supports(chunk, 128)
    assert not lib.supports(chunk, 7000)
    assert not lib.supports(q(1, 7000, 24, 128), 7040)
    assert not lib.supports(q(1, 7040, 24, 64), 7040)
    assert not lib.supports(q(1, 7040, 24, 128, dtype=jnp.float32), 7040)


@pytest.mark.parametrize(("lib", "cases"), LIBS.values(), ids=LIBS)
def test_on_a_mesh_the_kernel_is_taken_in_a_manual_shard_map_alone(monkeypatch, lib, cases):
    """It cannot be partitioned: elsewhere attention is dense. Heads are sharded, as in a cache."""
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4, seq=2))
    arguments = cases.inputs(heads=2, layers=1, slots=1)
    # No other axis has a size of 2.
    specs = jax.tree.map(lambda x: jax.P(*("seq" if n == 2 else None for n in x.shape)), arguments)
    attend = functools.partial(lib.attention, dense=lambda q, k, v, kv_len: q)
    manual = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    pretend_hopper(monkeypatch)

    def on_mesh(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        placed = jax.tree.map(on_mesh, arguments, specs)
        for function, kernel in ((manual, True), (attend, False)):
            lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",))
            assert ("mosaic_gpu" in lowered.as_text()) == kernel
