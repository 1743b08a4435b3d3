"""Rotary position embedding over (time, row, column), exact at any position.

Su et al. (arXiv 2104.09864) per axis; the split of a head's pairs over the axes and the base follow
Wan2.2. An angle is position x frequency. In float32 that product is wrong past a few thousand
frames, and a table is finite, so positions stay integers and the angle is reduced modulo 2 pi in
fixed point, before anything is rounded.
"""

import jax
import jax.numpy as jnp
import numpy as np

BASE = 10000.0
_CYCLE = 2.0**32  # 2 pi in fixed point


def exact_angle(
    position: jax.Array, frequency: np.ndarray, fraction: jax.Array | None = None
) -> jax.Array:
    """(position + fraction) x frequency, modulo 2 pi.

    Args:
      position: int32 [...], magnitude below 2**24.
      frequency: float64 [n], radians a position, in [0, 1]; a constant known on the host.
      fraction: float32 [...], in [0, 1), added to the position.

    Returns:
      float32 [..., n] in about [-pi, pi + 1], within 1e-6 of the exact angle.
    """
    units = np.asarray(frequency, np.float64) / (2 * np.pi) * _CYCLE
    whole = np.floor(units)
    high = jnp.asarray(whole.astype(np.uint32))
    low = jnp.asarray((units - whole).astype(np.float32))
    position = position[..., None]
    # uint32 arithmetic wraps: exactly the reduction modulo 2 pi. What `high` drops is less than one
    # unit a position, small enough for float32.
    wrapped = jax.lax.bitcast_convert_type(position, jnp.uint32) * _like(high, position)
    rest = jnp.round(position.astype(jnp.float32) * _like(low, position)).astype(jnp.int32)
    signed = jax.lax.bitcast_convert_type(wrapped, jnp.int32) + rest
    angle = signed.astype(jnp.float32) * jnp.float32(2 * np.pi / _CYCLE)
    if fraction is not None:
        angle = angle + fraction[..., None] * _like(jnp.asarray(frequency, jnp.float32), position)
    return angle


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def axis_frequencies(head_dim: int) -> tuple[np.ndarray, ...]:
    """Frequencies of the (time, row, column) pairs of a head: 22, 21 and 21 of them at 128."""
    pairs = head_dim // 2
    space = pairs // 3
    return tuple(BASE ** (-np.arange(n) / n) for n in (pairs - 2 * space, space, space))


def angles(positions: jax.Array, height: int, width: int, head_dim: int) -> jax.Array:
    """Angles of a block of tokens.

    Args:
      positions: int32 [..., frame], temporal indices of latent frames.
      height, width: of the token grid.

    Returns:
      float32 [..., frame, height * width, head_dim / 2], pairs ordered time, row, column.
    """
    time, row, column = axis_frequencies(head_dim)
    shape = (*positions.shape, height, width)
    parts = (
        exact_angle(positions, time)[..., None, None, :],
        exact_angle(jnp.arange(height, dtype=jnp.int32), row)[:, None, :],
        exact_angle(jnp.arange(width, dtype=jnp.int32), column)[None, :, :],
    )
    parts = [jnp.broadcast_to(_lead(p, len(shape) + 1), (*shape, p.shape[-1])) for p in parts]
    return jnp.concatenate(parts, axis=-1).reshape(*positions.shape, height * width, head_dim // 2)


def _lead(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotates the pairs (2i, 2i + 1) of each head, in float32, rounded once.

    Args:
      x: [..., token, head, head_dim].
      angle: float32 [..., token, head_dim / 2], same leading axes or 1.
    """
    cos, sin = jnp.cos(angle)[..., None, :, None], jnp.sin(angle)[..., None, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    # (a cos - b sin, b cos + a sin). Stacked from two arrays, XLA would make them separately.
    signs = jnp.asarray([-1.0, 1.0], jnp.float32).reshape((1,) * angle.ndim + (1, 2))
    rotated = pairs * cos + jnp.flip(pairs, axis=-1) * (sin * signs)
    return rotated.reshape(x.shape).astype(x.dtype)
