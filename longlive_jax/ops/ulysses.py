"""All-to-all between tokens and heads (Jacobs et al., arXiv 2309.14509).

Outside attention each device has some frames or chunks of every head; inside, every token of some
heads. These functions run inside a fully manual `jax.shard_map`.

The data of one device is contiguous: the first axis of a message counts devices. With a layout of
its own choice XLA:GPU would send head by head, and reorder all that arrives.
"""

import jax
import jax.numpy as jnp


def to_heads(x: jax.Array, mesh_axis: str | None, token_axis: int) -> jax.Array:
    """[.., token / n, .., head, head_dim] -> [.., token, .., head / n, head_dim].

    `token_axis` is the axis that is sharded over `mesh_axis`; None: one device, nothing to do.
    """
    if mesh_axis is None:
        return x
    return _merge(_exchange(_split(x, mesh_axis, x.ndim - 2), mesh_axis), token_axis)


def to_tokens(x: jax.Array, mesh_axis: str | None, token_axis: int) -> jax.Array:
    """The inverse of `to_heads`."""
    if mesh_axis is None:
        return x
    return _merge(_exchange(_split(x, mesh_axis, token_axis), mesh_axis), x.ndim - 2)


def _exchange(x, mesh_axis):
    """[device to send to, ...] -> [device that it came from, ...]."""
    return jax.lax.all_to_all(x, mesh_axis, split_axis=0, concat_axis=0, tiled=True)


def _split(x, mesh_axis, axis):
    """[.., n * m, ..] -> [n, .., m, ..]."""
    parts = (jax.lax.axis_size(mesh_axis), -1)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :]), axis, 0)


def _merge(x, axis):
    """[n, .., m, ..] -> [.., n * m, ..]."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
