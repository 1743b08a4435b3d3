"""What tests of attention over the cache share: inputs, real sizes, and how far is too far."""

import functools

import jax
import jax.numpy as jnp

from longlive_jax.formats import FP8Tensor, quantize_fp8
from longlive_jax.kernels import attention_fp8
from tests.kernels.checks import Chunk, error, shaped

HEAD_DIM = 128


def flat(lib):
    """A file's kernel, with the arguments of `ops.cached_attention`."""

    def kernel(q, fresh, past, layer, filled, **options):
        return lib.kernel(q, *fresh, *past, layer, filled, **options)

    return kernel


def supports(lib):
    return lambda q, fresh, past, *_: lib.supports(q, *fresh, *past)


def check(result, expected, limit):
    assert result.dtype == expected.dtype and error(result, expected) < limit


def inputs(rows=1, queries=128, tokens=128, slots=2, layers=2, heads=1, dtype=jnp.bfloat16):
    """q, fresh, past, layer, filled: all slots but `rows` - 1, then one more a row."""
    keys = jax.random.split(jax.random.key(0), 5)

    def draw(key, *shape):
        return jax.random.normal(key, shape, dtype)

    past = (layers, rows, slots, tokens, heads, HEAD_DIM)
    q = draw(keys[0], rows, queries, heads, HEAD_DIM) * 2
    fresh = tuple(draw(key, rows, tokens, heads, HEAD_DIM) for key in keys[1:3])
    filled = jnp.arange(slots - rows + 1, slots + 1, dtype=jnp.int32)
    return q, fresh, tuple(draw(key, *past) for key in keys[3:]), jnp.int32(layers - 1), filled


def quantized(x):
    """[..., token, head, head_dim] in E4M3, one scale for the tokens and channels of a head."""
    by_head = jnp.moveaxis(x, -2, -3)
    q = quantize_fp8(by_head.reshape(*by_head.shape[:-2], -1), axis=-1)
    values = jnp.moveaxis(q.values.reshape(by_head.shape), -3, -2)
    return FP8Tensor(values=values, scale=q.scale[..., None, :, :], dtype=q.dtype)


def stored(k, v):
    return attention_fp8.pack(quantized(k), quantized(v))


def inputs_fp8(rows=1, slots=2, **sizes):
    """As `inputs`, packed; values of different slots differ in size; all but one slot, then all."""
    q, fresh, (past_k, past_v), layer, _ = inputs(rows=rows, slots=slots, **sizes)
    size = jnp.asarray([4.0**i for i in range(slots)], past_v.dtype)
    past = stored(past_k, past_v / size.reshape(1, 1, -1, 1, 1, 1))
    return q, stored(*fresh), past, layer, jnp.arange(rows, dtype=jnp.int32) + (slots - 1)


def beyond(args, value=jnp.nan, filled=1):
    """Slots from `filled` on are no numbers, and not to be read."""
    q, fresh, past, layer, _ = args
    past = jax.tree.map(lambda leaf: leaf.at[:, :, filled:].set(value), past)
    return q, fresh, past, layer, jnp.full(len(q), filled, jnp.int32)


def chunks(function, lib, make, tunings):
    """A function of `ops` at real sizes, and the kernel by tunings other than the default."""
    arguments = jax.eval_shape(lambda: make(heads=24, queries=7040, tokens=7040, slots=3))
    specs = jax.tree.map(lambda x: jax.P(*("seq" if n == 24 else None for n in x.shape)), arguments)
    by_tuning = {
        name: Chunk(functools.partial(flat(lib), tuning=tuning), arguments)
        for name, tuning in tunings.items()
        if name != "default"
    }
    sharded = Chunk(function, arguments, specs=specs, out_specs=specs[0], check_vma=False)
    return by_tuning | {"window": sharded}


def window(queries=7040, tokens=7040, head_dim=128, dtype=jnp.bfloat16, past=jnp.bfloat16):
    """q, fresh and past of a real size, as shapes."""
    fresh = shaped(1, tokens, 24, head_dim, dtype=dtype)
    cached = shaped(2, 1, 3, tokens, 24, head_dim, dtype=past)
    return shaped(1, queries, 24, head_dim, dtype=dtype), (fresh, fresh), (cached, cached)
