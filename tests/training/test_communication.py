"""What the devices send each other in a step of the full-size model, without compiling it."""

import collections
import dataclasses
import math

import jax
import pytest

from configs import sample_5b
from longlive_jax import collectives
from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.training import state as state_lib
from longlive_jax.training.objectives.teacher_forcing import MODEL, TeacherForcing
from longlive_jax.training.step import Step

COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "psum", "ppermute")
WEIGHTS = 7  # matrices of a block: qkv, o; q, kv, o; two of the FFN


def config(mesh):
    cfg = lib.from_config_dict(sample_5b.get_config())
    train = dataclasses.replace(cfg.train, batch_size=mesh.data * mesh.fsdp)
    return dataclasses.replace(cfg, mesh=mesh, train=train)


def traced(mesh):
    cfg = config(mesh)
    objective = TeacherForcing(cfg, mesh_lib.make_mesh(mesh))
    program = Step(objective).programs[(MODEL,)]
    return program.trace(state_lib.abstract(objective), (), objective.batch).jaxpr.jaxpr


def sent(jaxpr) -> collections.Counter:
    found = collections.Counter()
    for times, equation in collectives.equations(jaxpr):
        name = equation.primitive.name.removesuffix("_invariant")
        found += collections.Counter({kind: times for kind in COLLECTIVES if name.startswith(kind)})
    return found


def layers(jaxpr):
    """Bodies of the scans over the 30 layers: forward, then backward."""
    for _, equation in collectives.equations(jaxpr):
        if equation.primitive.name == "scan" and equation.params["length"] == 30:
            yield equation.params["jaxpr"]


@pytest.mark.parametrize("mesh", [lib.Mesh(seq=4), lib.Mesh(fsdp=2, seq=4)], ids=str)
def test_a_block_communicates_weights_and_heads_and_nothing_else(mesh):
    forward, backward = layers(traced(mesh))
    # q, k, v to heads and the output to tokens.
    assert sent(forward) == {"all_to_all": 4, "all_gather": WEIGHTS}
    # Their transposes, and the forward's again but for what is kept.
    found = sent(backward)
    assert found["all_gather"] == found["reduce_scatter"] == WEIGHTS
    assert 4 <= found["all_to_all"] <= 8 and not found["psum"] and not found["ppermute"]


def test_one_device_receives_nothing():
    forward, backward = layers(traced(lib.Mesh()))
    assert not sent(forward) and not sent(backward)


def test_parameters_and_all_that_mirrors_them_are_sharded():
    cfg = config(lib.Mesh(fsdp=2, seq=4))
    state = state_lib.abstract(TeacherForcing(cfg, mesh_lib.make_mesh(cfg.mesh)))
    large = [x for x in jax.tree.leaves(state) if x.size > 1e6]
    whole = sum(4 * x.size for x in large)
    on_one = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in large)
    assert whole > 59e9 and on_one < 1.01 * whole / 8
