"""What a training run would take, from shapes alone: nothing is allocated."""

import math

import jax

from longlive_jax import collectives
from longlive_jax import params as params_lib
from longlive_jax.training import state as state_lib
from longlive_jax.training.objective import Objective
from longlive_jax.training.step import Step


def report(objective: Objective) -> str:
    """Compiles the steps; memory and traffic of each device, and how parameters lie, as a text."""
    step, abstract, mesh = Step(objective), state_lib.abstract(objective), objective.mesh
    count = sum(params_lib.count(network.specs) for network in objective.networks.values())
    lines = [
        f"{count:,} parameters on {mesh.size} devices: "
        + ", ".join(f"{name}={size}" for name, size in mesh.shape.items()),
        "",
        "each device holds, GiB",
        *(f"  {name:<22}{_gib(_bytes(tree)):>10}" for name, tree in _trees(objective, abstract)),
    ]
    for due in step.programs:
        traced = step.trace(due)
        memory = traced.lower().compile().memory_analysis()
        assert memory is not None
        of = "" if len(step.programs) == 1 else f" of {', '.join(due) or 'no network'}"
        lines += [
            f"the compiled step{of}, GiB a device",
            f"  {'arguments':<22}{_gib(memory.argument_size_in_bytes):>10}",
            f"  {'temporaries':<22}{_gib(memory.temp_size_in_bytes):>10}",
            f"  {'output':<22}{_gib(memory.output_size_in_bytes):>10}",
            f"  {'of it in arguments':<22}{_gib(memory.alias_size_in_bytes):>10}",
            *_work(traced.jaxpr, objective.cost(due).flops, mesh),
        ]
    lines += ["", f"{'parameters':<42}{'shape':<22}{'spread over':<28}{'GiB a device':>12}"]
    for network in abstract.networks.values():
        lines += _table(network.params)
    return "\n".join(lines)


def _work(jaxpr, flops, mesh):
    if flops:
        yield f"  {'model TFLOP':<22}{flops / mesh.size / 1e12:>10.4g}"
    yield from collectives.lines(jaxpr, mesh)


def _trees(objective, state):
    for name, network in state.networks.items():
        prefix = "" if len(state.networks) == 1 else f"{name} "
        yield f"{prefix}parameters", network.params
        yield f"{prefix}optimiser", network.opt_state
        if network.ema is not None:
            yield f"{prefix}moving average", network.ema
    if state.carried is not None:
        yield "carried state", state.carried
    if objective.frozen:
        yield "frozen arrays", objective.frozen


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
