"""All-to-all between tokens and heads (Jacobs et al., arXiv 2309.14509).

Outside attention each device holds some frames or chunks of every head; inside it holds every token
of some heads. These run inside a fully manual `jax.shard_map`.
"""

import jax


def to_heads(x: jax.Array, mesh_axis: str | None, token_axis: int) -> jax.Array:
    """[.., token / n, .., head, head_dim] -> [.., token, .., head / n, head_dim].

    `token_axis` is the axis that is sharded over `mesh_axis`; None: one device, nothing to do.
    """
    if mesh_axis is None:
        return x
    return jax.lax.all_to_all(
        x, mesh_axis, split_axis=x.ndim - 2, concat_axis=token_axis, tiled=True
    )


def to_tokens(x: jax.Array, mesh_axis: str | None, token_axis: int) -> jax.Array:
    """The inverse of `to_heads`."""
    if mesh_axis is None:
        return x
    return jax.lax.all_to_all(
        x, mesh_axis, split_axis=token_axis, concat_axis=x.ndim - 2, tiled=True
    )
