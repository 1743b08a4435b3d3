"""What the devices of a mesh send each other in a program, from its jaxpr alone.

The programs here are manual `shard_map`s: the compiler adds no communication to them, which tests
hold. A jaxpr says how often a loop runs, which compiled text for TPUs does not.
"""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

# Of a device's input, how much it sends to the n devices of its group in all, by rings.
_SENT = {
    "all_gather": lambda n: n - 1,
    "all_to_all": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "psum": lambda n: 2 * (n - 1) / n,
    "pmax": lambda n: 2 * (n - 1) / n,
    "pmin": lambda n: 2 * (n - 1) / n,
    "ppermute": lambda n: 1,
}


class Kind(NamedTuple):
    """A collective by its name in JAX, over these axes of the mesh."""

    name: str
    axes: tuple[str, ...]


class Traffic(NamedTuple):
    """How often a program runs a kind of collective, and the bytes that one device sends by it."""

    times: int
    sent: int


def sent(name: str, devices: int) -> float:
    """Of a device's input to a collective, how much it sends in all to a group of `devices`."""
    return _SENT[name](devices)


def traffic(jaxpr: Any, axes: Mapping[str, int]) -> dict[Kind, Traffic]:
    """Of a program: what each device sends, loops counted as often as they run.

    Groups of one device send nothing and are left out. Of a `cond` the branch that sends most
    counts, and a `while` of unknown length once.

    Args:
      jaxpr: of `jax.jit(f).trace(...)`, or one in it.
      axes: the mesh's axes and their sizes.
    """
    total: dict[Kind, Traffic] = collections.defaultdict(lambda: Traffic(0, 0))
    for times, equation in equations(jaxpr):
        name = equation.primitive.name.removesuffix("_invariant")
        if name not in _SENT:
            continue
        over = equation.params.get("axis_name", equation.params.get("axes"))
        over = tuple(a for a in (over if isinstance(over, tuple) else (over,)) if a in axes)
        group = math.prod(axes[a] for a in over)
        if group == 1:
            continue
        held = sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in equation.invars)
        before = total[kind := Kind(name, over)]
        sent = times * round(held * _SENT[name](group))
        total[kind] = Traffic(before.times + times, before.sent + sent)
    return dict(sorted(total.items(), key=lambda item: -item[1].sent))


def lines(jaxpr: Any, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """`traffic` as text, a line a kind."""
    for kind, (times, sent) in traffic(jaxpr, mesh.shape).items():
        name = f"{kind.name} over {'+'.join(kind.axes)}"
        yield f"  {name:<32}{times:>6} times, sends {sent / 2**30:.3g} GiB"


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[int, Any]]:
    """(times it runs, equation) of a jaxpr and of those inside it; `traffic` says how of a cond."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield times, equation
        inner = [x for x in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
                 if _is_jaxpr(x)]  # fmt: skip
        if equation.primitive.name == "cond":
            inner = [max(inner, key=_weight)]
        again = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for one in inner:
            yield from equations(one, again)


def _is_jaxpr(x):
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def _weight(jaxpr):
    """The bytes that a jaxpr's collectives take in."""
    found = (e for _, e in equations(jaxpr) if e.primitive.name.removesuffix("_invariant") in _SENT)
    return sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for e in found for x in e.invars)
