"""What a training run would take, from shapes alone: nothing is allocated."""

import math

import jax

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.training import state as state_lib
from longlive_jax.training.teacher_forcing import Step


def report(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> str:
    """Compiles the step; memory of each device, and how the parameters lie, as a text."""
    step = Step(cfg, mesh)
    abstract = state_lib.abstract(cfg, mesh)
    compiled = step.step.lower(abstract, step.batch_abstract()).compile()
    memory = compiled.memory_analysis()
    lines = [
        f"{params_lib.count(state_lib.specs(cfg)):,} parameters on {mesh.size} devices: "
        + ", ".join(f"{name}={size}" for name, size in mesh.shape.items()),
        "",
        "each device holds, GiB",
        *(f"  {name:<22}{_gib(_bytes(tree)):>10}" for name, tree in _held(abstract)),
        "the compiled step, GiB a device",
        f"  {'arguments':<22}{_gib(memory.argument_size_in_bytes):>10}",
        f"  {'temporaries':<22}{_gib(memory.temp_size_in_bytes):>10}",
        f"  {'output':<22}{_gib(memory.output_size_in_bytes):>10}",
        f"  {'of it in arguments':<22}{_gib(memory.alias_size_in_bytes):>10}",
        "",
        f"{'parameters':<42}{'shape':<22}{'spread over':<28}{'GiB a device':>12}",
    ]
    return "\n".join([*lines, *_table(abstract.params)])


def _held(state: state_lib.TrainState):
    yield "parameters", state.params
    yield "optimiser", state.optimizer
    yield "moving average", state.average
    if state.errors is not None:
        yield "recycled errors", state.errors


def _table(params: params_lib.Tree):
    for path, leaf in params_lib.flatten(params).items():
        over = ", ".join("-" if axes is None else _axes(axes) for axes in leaf.sharding.spec)
        shape = "x".join(map(str, leaf.shape))
        yield f"{'/'.join(path):<42}{shape:<22}{over:<28}{_gib(_bytes(leaf)):>12}"


def _axes(axes):
    return axes if isinstance(axes, str) else "+".join(axes)


def _bytes(tree) -> int:
    """Of one device's shards."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g}"
