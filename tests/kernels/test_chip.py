"""Which chip this is, and which arrays are local."""

import jax
import jax.numpy as jnp
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.kernels import chip
from tests.kernels.checks import pretend_hopper


@pytest.mark.parametrize(
    ("capability", "hopper"), [("9.0", True), ("8.9", False), ("10.0", False), (None, False)]
)
def test_hopper_is_capability_9(monkeypatch, capability, hopper):
    assert not chip.is_hopper()
    pretend_hopper(monkeypatch, capability)
    assert chip.is_hopper() == hopper
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not chip.is_hopper()


def test_local_is_without_a_mesh_or_inside_a_manual_shard_map():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4, seq=2))
    seen = []

    def look(x):
        seen.append(chip.is_local(x))
        return x

    x = jnp.ones((8, 8))
    jax.jit(look)(x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", "seq")))
        jax.jit(look).trace(x)
        for axes in ({"fsdp"}, set(mesh.axis_names)):
            spec = jax.P("fsdp")
            jax.jit(jax.shard_map(look, in_specs=spec, out_specs=spec, axis_names=axes)).trace(
                jax.device_put(x, jax.NamedSharding(mesh, spec))
            )
    assert seen == [True, False, False, True]
    assert chip.is_local(jax.ShapeDtypeStruct((8, 8), jnp.float32))
