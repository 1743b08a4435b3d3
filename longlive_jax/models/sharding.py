"""One device's share inside a manual `jax.shard_map`, and its exchanges with other devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.formats import Format
from longlive_jax.ops import ulysses
from longlive_jax.quant import kv


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How tokens, heads and parameters are sharded. The default is for no `shard_map`."""

    seq: str | None = None  # mesh axis that shards chunks (training) or frames (sampling)
    rules: tuple[tuple[str, str | tuple[str, ...]], ...] = ()  # how parameters are sharded
    payload: Format | None = None  # of the sampler's all-to-alls; None: x unquantised

    @classmethod
    def sampling(cls, payload: Format | None = None) -> "Sharding":
        return cls(mesh_lib.SEQ, tuple(mesh_lib.SAMPLING_RULES.items()), payload)

    @classmethod
    def training(cls) -> "Sharding":
        return cls(mesh_lib.SEQ, tuple(mesh_lib.RULES.items()))

    def to_heads(self, x: jax.Array) -> kv.Stored:
        """[batch, token / n, head, head_dim] -> [batch, token, head / n, head_dim], as sent."""
        if self.seq_axis is None:
            return x
        send = functools.partial(ulysses.to_heads, mesh_axis=self.seq_axis, token_axis=1)
        return kv.exchange(kv.store(self.payload, x, self.seq_axis), send)

    def to_tokens(self, x: jax.Array) -> jax.Array:
        """[batch, token, head / n, head_dim] -> [batch, token / n, head, head_dim]."""
        if self.seq_axis is None:
            return x
        send = functools.partial(ulysses.to_tokens, mesh_axis=self.seq_axis, token_axis=1)
        sent = kv.exchange(kv.store(self.payload, x, self.seq_axis), send)
        return kv.load(sent, x.dtype)

    def gather(
        self, tree: params_lib.Tree, specs: params_lib.Tree, dtype: jnp.dtype | None = None
    ) -> params_lib.Tree:
        """Whole parameters on this device.

        dtype: of sharded parameters while they are gathered; None: their own.
        """
        return params_lib.gather(tree, specs, self.shards, dtype)

    def sum(self, tree):
        """Each array's sum over all devices."""
        return _sum_over(tree, mesh_lib.AXES)

    def sum_gradients(self, gradient: params_lib.Tree, specs: params_lib.Tree) -> params_lib.Tree:
        """Gradients of `gather`'s argument, summed over devices with equal parameters.

        The gradient of `gather` has already summed over the other devices.
        """
        shards = self.shards

        def one(spec, g):
            gathered = [shards[name] for name in spec.axes if name in shards]
            done = {a for axis in gathered for a in ((axis,) if isinstance(axis, str) else axis)}
            return _sum_over(g, [axis for axis in mesh_lib.AXES if axis not in done])

        return jax.tree.map(one, specs, gradient, is_leaf=params_lib.is_spec)

    @property
    def seq_axis(self) -> str | None:
        """`seq`, if it has more than one device; else None."""
        return _with_others(self.seq)

    @property
    def shards(self) -> dict[str, str | tuple[str, ...]]:
        """The `rules` that shard parameters over more than one device."""
        return {name: axis for name, axis in self.rules if _with_others(axis) is not None}


def _sum_over(tree, axes):
    axes = tuple(axis for axis in axes if _with_others(axis) is not None)
    return jax.lax.psum(tree, axes) if axes else tree


def _with_others(axis):
    """The axis; None if it has one device, for which XLA would make a collective a copy."""
    return None if axis is None or jax.lax.axis_size(axis) == 1 else axis
