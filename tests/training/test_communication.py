"""What the devices tell each other in a step of the full-size model, without compiling it."""

import collections
import dataclasses
import math

import jax
import pytest

from configs import sample_5b
from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.training import state as state_lib
from longlive_jax.training import teacher_forcing

COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "psum", "ppermute")
WEIGHTS = 7  # matrices of a block: qkv, o; q, kv, o; two of the FFN


def config(mesh):
    cfg = lib.from_config_dict(sample_5b.get_config())
    train = dataclasses.replace(cfg.train, batch_size=mesh.data * mesh.fsdp)
    return dataclasses.replace(cfg, mesh=mesh, train=train)


def traced(mesh):
    cfg = config(mesh)
    step = teacher_forcing.Step(cfg, mesh_lib.make_mesh(mesh))
    return step.step.trace(state_lib.abstract(cfg, step.mesh), step.batch_abstract()).jaxpr.jaxpr


def inner(equation):
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def collectives(jaxpr) -> collections.Counter:
    found = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removesuffix("_invariant")
        found += collections.Counter(kind for kind in COLLECTIVES if name.startswith(kind))
        for one in inner(equation):
            found += collectives(one)
    return found


def layers(jaxpr):
    """Bodies of the scans over the 30 layers: forward, then backward."""
    for equation in jaxpr.eqns:
        bodies = list(inner(equation))
        if equation.primitive.name == "scan" and equation.params["length"] == 30:
            yield bodies[0]
        else:
            for one in bodies:
                yield from layers(one)


@pytest.mark.parametrize("mesh", [lib.Mesh(seq=4), lib.Mesh(fsdp=2, seq=4)], ids=str)
def test_a_block_communicates_weights_and_heads_and_nothing_else(mesh):
    forward, backward = layers(traced(mesh))
    # q, k, v to heads and the output to tokens.
    assert collectives(forward) == {"all_to_all": 4, "all_gather": WEIGHTS}
    # Their transposes, and the forward's again but for what is kept.
    told = collectives(backward)
    assert told["all_gather"] == told["reduce_scatter"] == WEIGHTS
    assert 4 <= told["all_to_all"] <= 8 and not told["psum"] and not told["ppermute"]


def test_one_device_is_not_told_anything():
    forward, backward = layers(traced(lib.Mesh()))
    assert not collectives(forward) and not collectives(backward)


def test_parameters_and_all_that_mirrors_them_are_sharded():
    cfg = config(lib.Mesh(fsdp=2, seq=4))
    state = state_lib.abstract(cfg, mesh_lib.make_mesh(cfg.mesh))
    large = [x for x in jax.tree.leaves(state) if x.size > 1e6]
    whole = sum(4 * x.size for x in large)
    held = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in large)
    assert whole > 59e9 and held < 1.01 * whole / 8
