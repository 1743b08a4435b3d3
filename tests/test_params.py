"""Parameter specs and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params
from longlive_jax.errors import InputError
from longlive_jax.models import dit

CFG = config_lib.from_config_dict(tiny.get_config())
SPECS = dit.spec(CFG.model)


@pytest.mark.slow
def test_initial_values_do_not_depend_on_the_mesh():
    values = params.init(SPECS, jax.random.key(0))
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=2, fsdp=2, seq=2))
    sharded = jax.jit(
        lambda key: params.init(SPECS, key), out_shardings=params.shardings(SPECS, mesh)
    )(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sharded, values)
    embed = sharded["blocks"]["self_attn"]["qkv"]["weight"]
    assert embed.sharding.shard_shape(embed.shape) == (2, 16, 192)


def test_initial_values_are_drawn_by_path():
    values = params.init(SPECS, jax.random.key(0))["blocks"]
    q, k, _ = np.split(np.asarray(values["self_attn"]["qkv"]["weight"]), 3, axis=-1)
    assert not np.allclose(q, k)
    assert not np.allclose(values["self_attn"]["o"]["weight"], values["cross_attn"]["o"]["weight"])
    first, second = values["self_attn"]["o"]["weight"]
    assert not np.allclose(first, second)  # layers differ
    bound = np.sqrt(6 / 128)
    assert np.abs(first).max() <= bound and np.std(first) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_more_layers_leave_the_first_ones_as_they_are():
    deep = config_lib.Model(**(CFG.model.__dict__ | {"num_layers": 3}))
    few = params.init(SPECS, jax.random.key(1))["blocks"]
    many = params.init(dit.spec(deep), jax.random.key(1))["blocks"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), few, many)


def test_paths_round_trip_and_count():
    flat = params.flatten(SPECS)
    assert params.unflatten(flat) == SPECS
    assert ("blocks", "ffn", "0", "weight") in flat
    values = params.init(SPECS, jax.random.key(0))
    assert params.count(SPECS) == sum(x.size for x in jax.tree.leaves(values))


def test_abstract_arrays_carry_dtype_and_sharding():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4))
    tree = params.abstract(SPECS, mesh, jnp.bfloat16)
    leaf = tree["blocks"]["ffn"]["2"]["weight"]
    assert leaf.dtype == jnp.bfloat16 and leaf.sharding.shard_shape(leaf.shape) == (2, 128, 16)


def test_gather_gives_whole_parameters_and_scattered_gradients():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=2, seq=2))
    specs = {"w": params.ParamSpec((8, 3), ("embed", None))}
    w = np.arange(24, dtype=np.float32).reshape(8, 3)

    def loss(tree):
        whole = params.gather(tree, specs, mesh_lib.RULES)["w"]
        assert whole.shape == (8, 3)
        return jnp.sum(whole**2)[None]

    run = jax.shard_map(
        jax.grad(lambda t: loss(t)[0]),
        mesh=mesh, in_specs=(params.partition_specs(specs),), out_specs=params.partition_specs(specs),
    )  # fmt: skip
    placed = {"w": jax.device_put(w, params.shardings(specs, mesh)["w"])}
    np.testing.assert_allclose(jax.jit(run)(placed)["w"], 4 * 2 * w)  # four devices, each its loss


def test_a_mesh_that_is_too_large_says_what_to_do():
    with pytest.raises(
        InputError, match=r"seq=16 needs 16 devices, 8 found.*JAX_NUM_CPU_DEVICES=16"
    ):
        mesh_lib.make_mesh(config_lib.Mesh(seq=16))


def test_axes_without_a_rule_are_not_sharded():
    assert mesh_lib.spec(("batch", "frame", None, "channel")) == jax.P(
        ("data", "fsdp"), "seq", None, None
    )


def test_processes_need_a_coordinator():
    with pytest.raises(InputError, match="--coordinator"):
        mesh_lib.start(num_processes=2, process_id=0)
