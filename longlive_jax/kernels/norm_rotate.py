"""RMS norm and rotation of queries and keys, and the split of q, k, v, in one pass, on Hopper.

XLA makes five kernels of it, and writes and reads queries and keys in between. Here a program, one
warpgroup, reads a token's row of the fused projection into registers, at once, and writes three.
Many programs share a multiprocessor and hide each other's latency. The scales and the bias of a
product's columns, which all programs read, come through the cache.

Arrays are [n, 8]: of every eighth head a thread has 8 numbers, 16 bytes, in its own row, so that
swapping the numbers of a pair only renames registers. All its heads need the same 4 angles. The 64
angles reach 128 threads through shared memory, where they are written eight times over.

The bits equal those of `ops.norm.rms_norm` and `ops.rope.rotate` by XLA, but for the order of sums:
no product is contracted into a sum that XLA keeps apart from it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import mosaic
from longlive_jax.kernels import rows as lib
from longlive_jax.kernels.chip import takes

HEAD_DIM = 128
_THREADS = 128
_WORD = lib.SLICE // _THREADS
_PAIRS = _WORD // 2
_WIDE, _NARROW = mosaic.a_row_a_thread(_WORD), mosaic.a_row_a_thread(1)
# Of a row's angles [16, 4]: every 16 threads have all.
_ANGLES = plgpu.Layout.TILED(
    plgpu.Tiling(((HEAD_DIM // _WORD, _PAIRS),)),
    warp_dims=(plgpu.Replicated(4),), lane_dims=(plgpu.Replicated(2), -2), vector_dim=-1,
)  # fmt: skip


def supports(
    qkv: jax.Array | PendingMatmul, weight_q: jax.Array, weight_k: jax.Array, angle: jax.Array
) -> bool:
    """Whether the kernel takes these: bfloat16, local, heads of 128, on a Hopper GPU."""
    return takes(qkv) and not _misfit(qkv, weight_q, weight_k, angle, angle)


def _misfit(qkv, weight_q, weight_k, cos, sin):
    """Why the kernel does not take the arguments; empty: it does."""
    if qkv.dtype != jnp.bfloat16:
        return f"qkv is {qkv.dtype}; it must be bfloat16: cast it"
    dim = qkv.shape[-1] // 3
    if qkv.shape[-1] % (3 * lib.SLICE) or dim > lib.MAX_NORMED or 0 in qkv.shape:
        most = lib.MAX_NORMED
        return f"qkv {qkv.shape} must end in 3 * dim, dim a multiple of {lib.SLICE} up to {most}"
    if weight_q.shape != (dim,) or weight_k.shape != (dim,):
        return f"weights are {weight_q.shape} and {weight_k.shape}; they must be ({dim},)"
    if cos.shape != (*qkv.shape[:-1], HEAD_DIM // 2) or sin.shape != cos.shape:
        return (
            f"cos {cos.shape} and sin {sin.shape} must have qkv's leading axes "
            f"{qkv.shape[:-1]}, then {HEAD_DIM // 2}: broadcast them"
        )
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        return f"cos is {cos.dtype}, sin {sin.dtype}; they must be float32"
    return ""


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def kernel(
    qkv: jax.Array | PendingMatmul,
    weight_q: jax.Array,
    weight_k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    eps: float = 1e-6,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel itself, on one device's arrays (on a mesh: in a manual `jax.shard_map`).

    Jitted: a model of many layers lowers it once.

    Args:
      qkv: [..., 3 * dim], bfloat16, dim a multiple of 1,024, at most 6,144. Of a product the
        scales and the bias come first, in float32, and one rounding to bfloat16.
      weight_q, weight_k: [dim], of the norms, bfloat16 or float32.
      cos, sin: float32 [..., 64], of the angles of the pairs (2i, 2i + 1) of every head; qkv's
        leading axes.
      eps: of the norms.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      q and k, normalised and rotated, and v, each bfloat16 [..., head, 128].

    Raises:
      InputError: other dtypes or shapes.
    """
    if misfit := _misfit(qkv, weight_q, weight_k, cos, sin):
        raise InputError(f"norm_rotate kernel: {misfit}; or use ops.rotated")
    tokens, words = math.prod(qkv.shape[:-1]), qkv.shape[-1] // (3 * _WORD)
    shared = plgpu.SMEM((_THREADS, _PAIRS), jnp.float32)
    if isinstance(qkv, PendingMatmul):
        columns = (y.reshape(3, words, _WORD) for y in (qkv.column, qkv.bias))
        sums, scales = qkv.sums, (qkv.row.reshape(-1), *columns)
    else:
        sums, scales = qkv, ()
    outs = plgpu.kernel(
        functools.partial(_kernel, eps=eps),
        out_type=(jax.ShapeDtypeStruct((tokens, words, _WORD), qkv.dtype),) * 3,
        grid=(tokens,),
        grid_names=("row",),
        kernel_name="norm_rotate",
        scratch_types={"shared_cos": shared, "shared_sin": shared},
        compiler_params=lib.COMPILER,  # `_spread` has the one barrier that is needed
        interpret=interpret,
    )(
        sums.reshape(tokens, 3, words, _WORD),
        *(weight.reshape(words, _WORD) for weight in (weight_q, weight_k)),
        *(x.reshape(tokens, HEAD_DIM // _WORD, _PAIRS) for x in (cos, sin)),
        *scales,
    )
    return tuple(x.reshape(*qkv.shape[:-1], -1, HEAD_DIM) for x in outs)


def _kernel(qkv, weight_q, weight_k, cos, sin, *refs, shared_cos, shared_sin, eps):
    *scales, q, k, v = refs
    row = lax.axis_index("row")
    parts = [mosaic.load(qkv.at[row, part], _WIDE) for part in range(3)]
    c, s = (mosaic.load(x.at[row], _ANGLES) for x in (cos, sin))
    rate = scales[0][row] if scales else None

    # One after the other: the columns of all three would take a third more registers.
    def finished(part):
        x = parts[part]
        return _scaled(x, rate, *(y.at[part] for y in scales[1:])) if scales else x

    mosaic.store(v.at[row], finished(2))
    c, s = _spread((c, s), (shared_cos, shared_sin))
    c = _join([c[n // 2] for n in range(_WORD)])
    s = _join([s[n // 2] if n % 2 else -s[n // 2] for n in range(_WORD)])
    for part, (weight, out) in enumerate(((weight_q, q), (weight_k, k))):
        made = [_rotated(y, c, s, zero) for y, zero in _normed(finished(part), weight, eps)]
        mosaic.store(out.at[row], jnp.concatenate(made, axis=0))


def _scaled(x, rate, column, bias):
    """A row [n, 8] of a product's sums, times its scales, plus its bias, in bfloat16."""
    column, bias = (_slices(mosaic.load(ref, _WIDE)) for ref in (column, bias))
    made = [
        lib.rounded(y.astype(jnp.float32) * rate * c + b.astype(jnp.float32))
        for y, c, b in zip(_slices(x), column, bias)
    ]
    return jnp.concatenate(made, axis=0)


def _spread(angles, shared):
    """The 4 of a row's angles [16, 4] that each thread needs: columns [128, 1]."""
    for x, ref in zip(angles, shared):
        mosaic.store(ref, jnp.concatenate([x] * (_THREADS // len(x)), axis=0))
    plgpu.commit_smem()
    return [_columns(mosaic.load(ref, mosaic.a_row_a_thread(_PAIRS))) for ref in shared]


def _normed(x, weight, eps):
    """A row [n, 8] as by `ops.norm.rms_norm`, in slices [128, 8]. With each a -0.0, see `_rotated`.

    The mean is not negative. Its magnitude, which costs nothing, keeps `eps` a sum by itself.
    """
    weight = _slices(mosaic.load(weight, _WIDE))
    x = x.astype(jnp.float32)
    mean = jnp.sum(jnp.sum(x * x, axis=1)) * (1 / x.size)
    rate = lax.rsqrt(jnp.abs(mean) + eps)
    x = [y * rate * w.astype(jnp.float32) for y, w in zip(_slices(x), weight)]
    return [(lib.rounded(y), rate * -0.0) for y in x]


def _rotated(x, cos, sin, zero):
    """As `ops.rope.rotate`, of bfloat16 [128, 8]. sin: negative for the first of a pair.

    Products are contracted into a sum that they feed. XLA rounds both here: they are contracted
    with `zero`, -0.0, which changes no number, and which the compiler does not know.
    """
    x = _columns(x.astype(jnp.float32))
    swapped = _join([x[i ^ 1] for i in range(_WORD)])
    made = (_join(x) * cos + zero) + (swapped * sin + zero)
    return plgpu.layout_cast(made, _WIDE).astype(jnp.bfloat16)


def _slices(x):
    return [x[i : i + _THREADS] for i in range(0, len(x), _THREADS)]


def _columns(x):
    """[128, n] -> [128, 1] each."""
    x = plgpu.layout_cast(x, _NARROW)
    return [x[:, i : i + 1] for i in range(x.shape[1])]


def _join(columns):
    return jnp.concatenate(columns, axis=1)
