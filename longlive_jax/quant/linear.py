"""The quantised linear layer: three products, each of two quantised tensors.

All quantised operands lie as a tensor core wants them, with the axis that is contracted last:
activations [sample, ..., in], weights [part, out, in]. `part` counts the original's matrices that
a fused weight is made of. Each sample and each part is a tensor of its own, with its own largest
magnitude, so that a sample's result does not depend on what else is in the batch; over the devices
that hold the rest of a sample the magnitude is a maximum.

Where nothing is quantised `ops.linear` runs, and nothing here does.
"""

import functools
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlive_jax.errors import InputError
from longlive_jax.formats import (
    FP8Tensor,
    NVFP4Tensor,
    Product,
    Quantized,
    exact,
    nvfp4,
    quantize_fp8,
    random_hadamard,
)
from longlive_jax.formats.fp8 import widen
from longlive_jax.kernels.chip import is_hopper
from longlive_jax.kernels.quantize_nvfp4 import quantize_each
from longlive_jax.ops import linear as plain
from longlive_jax.ops.quantized import quantize_rows
from longlive_jax.quant.recipe import FP8, NVFP4, Format, Recipe

# Names for `jax.checkpoint`: of what wgrad needs of the activation, and of largest magnitudes: a
# few bytes, without which a tensor that is made and quantised again is read once more.
SAVED = "quantized"
AMAX = "amax"


def linear(
    params: Mapping[str, jax.Array | Quantized],
    x: jax.Array | Quantized,
    recipe: Recipe | None = None,
    key: jax.Array | None = None,
    axes: Sequence[str] = (),
) -> jax.Array:
    """x [sample, ..., in] @ weight [in, out] + bias [out], in the formats of the recipe.

    The bias is added after the product's rounding to x's dtype, as in the original. Gradients of
    x, weight and bias have their dtypes. A weight that is quantised already has none.

    Args:
      params: weight: [in, out], or `quantize_weight` of one; bias: [out].
      x: activations, or `quantize_activation` of them, which several layers may share.
      recipe: of this layer, see `Recipe.at`; None: `ops.linear`.
      key: for recipes that round gradients stochastically: one key, or an array of keys for
        leading axes of x. With a key for each sample and chunk, gradients do not depend on how
        these are spread over devices. The layer's number is folded in here.
      axes: mesh axes, inside a manual `jax.shard_map`, over which a sample is spread.

    Raises:
      InputError: sides that are no multiple of 16 (NVFP4); a weight quantised in another format; a
        gradient by a recipe for inference, without its key, or through a weight quantised by rows.
    """
    if recipe is None:
        return plain.linear(params, x)
    weight, bias = params["weight"], params["bias"]
    if isinstance(x, Quantized):
        y = _forward(recipe, _in_memory(x), weight)
    else:
        keys = None if key is None else _keys_of(key, x.shape)
        rows = x.shape[:1] + ((1,) if keys is None else keys.shape[1:])
        tokens = x.reshape(*rows, -1, x.shape[-1])
        if not isinstance(weight, Quantized):
            weight = weight.astype(x.dtype)
        y = _product(recipe, tuple(axes), weight, tokens, keys)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
    once = _library_scales(recipe) and not isinstance(x, Quantized)
    return _add_bias(once, y, bias.astype(y.dtype))


def product(
    params: Mapping[str, jax.Array | Quantized],
    x: jax.Array | Quantized,
    recipe: Recipe | None = None,
    key: jax.Array | None = None,
    axes: Sequence[str] = (),
) -> jax.Array | Product:
    """`linear`, for what can take a `Product`: FP8's for inference, where a kernel may finish it.

    That is on a Hopper GPU, of x quantised by rows. Anywhere else it is `linear`, which rounds the
    product before it adds the bias; what finishes one rounds once.

    Args and raises: as `linear`.
    """
    fp8 = isinstance(x, FP8Tensor) and x.scale.ndim == x.ndim
    if not (fp8 and is_hopper() and recipe is not None and recipe.gradients is None):
        return linear(params, x, recipe, key, axes)
    weight = _quantized(params["weight"], recipe)
    sums = _sums(_in_memory(x), weight, x.dtype)
    return Product(
        sums=sums.reshape(*x.shape[:-1], -1),
        row=x.scale,
        column=_column_scales(weight).reshape(-1),
        bias=params["bias"].astype(x.dtype),
    )


def quantize_activation(x: jax.Array, recipe: Recipe, axes: Sequence[str] = ()) -> Quantized:
    """x [sample, ..., in] as the forward's operand: a tensor for each sample.

    Args: as `linear`.
    """
    return _quantize(x, recipe.activation, 1, axes)


def quantize_weight(weight: jax.Array, recipe: Recipe) -> Quantized:
    """A whole weight [in, out] as the forward's operand [part, out / part, in].

    Raises:
      InputError: sides that the format's blocks do not divide.
    """
    parts = weight.T.reshape(recipe.parts, -1, weight.shape[0])
    return _quantize(parts, recipe.weight, 1)


def matmul(x: Quantized, weight: Quantized, dtype, sums=None) -> jax.Array:
    """x [..., in] times weight [part, out, in] -> [..., part * out], scaled in float32.

    sums: dtype that the codes' products, added up in float32, leave the product in. None: float32,
      of 8-bit codes `dtype`: they are wrong by more than bfloat16's rounding, which halves what is
      written and read here.
    """
    lead = x.shape[:-1]
    if isinstance(x, NVFP4Tensor) and _has_fp4():
        operands = (x.values, weight.values, x.scales, weight.scales)
        y = jax.nn.scaled_matmul(*(y.reshape(1, -1, y.shape[-1]) for y in operands))
    else:
        if sums is None:
            sums = dtype if isinstance(x, FP8Tensor) else jnp.float32
        y = _sums(x, weight, sums)
    y = y.reshape(*lead, -1).astype(jnp.float32)
    scales = [_scale(q) for q in (x, weight)]
    if all(scale.size == 1 for scale in scales):
        # One number, which XLA's GemmRewriter gives to the library that makes the sums in float32.
        scales = [scale.reshape((1,) * y.ndim) for scale in scales]
    else:
        scales[1] = _column_scales(weight).reshape((1,) * len(lead) + (-1,))
    return (y * (scales[0] * scales[1])).astype(dtype)


def _sums(x, weight, dtype):
    """The codes' products, [row, part * out], added up in float32 and left in this dtype."""
    a, b = (_codes(q).reshape(-1, q.shape[-1]) for q in (x, weight))
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _column_scales(weight):
    """float32 [part, out, 1]: of the columns of a product by weight [part, out, in]."""
    return jnp.broadcast_to(_scale(weight), (*weight.shape[:-1], 1))


def _library_scales(recipe):
    """Whether a GPU's library ends a product with its scales and bias: one scale an operand."""
    fp8 = isinstance(recipe.weight, FP8) and recipe.gradients is not None
    return fp8 and recipe.parts == 1 and _multiplies_fp8()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_bias(once, y, bias):
    """Rounded as a sum in y's dtype would be. The bias's gradient is summed in float32.

    once: written so that XLA may have the library add the bias, before it rounds the product.
    """
    bias = bias.reshape((1,) * (y.ndim - 1) + bias.shape)
    if once:
        return y + bias
    return (exact.round_input(y) + bias.astype(jnp.float32)).astype(y.dtype)


def _add_bias_fwd(once, y, bias):
    return _add_bias(once, y, bias), None


def _add_bias_bwd(once, _, dy):
    del once
    # Of what the product's gradient quantises, so that XLA does not keep dy in float32 for this.
    return dy, jnp.sum(widen(dy), axis=range(dy.ndim - 1)).astype(dy.dtype)


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


# ---------------------------------------------------------------------------------------------
# The product and its gradient. Tokens are [sample, group, row, in] with a key for each group.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(recipe, axes, weight, x, keys):
    del keys
    return _forward(recipe, quantize_activation(x, recipe, axes), weight)


def _forward(recipe, x, weight):
    # For inference, sums of 4-bit codes may be rounded as those of 8-bit ones are.
    sums = x.dtype if recipe.gradients is None else None
    return matmul(x, _quantized(weight, recipe), x.dtype, sums)


def _product_fwd(recipe, axes, weight, x, keys):
    gradients = recipe.gradients
    if gradients is None:
        raise InputError(
            f"quant: recipe {recipe.name!r} is for inference and has no gradient; train with one "
            "that has, or in bf16"
        )
    if gradients.stochastic and keys is None:
        raise InputError(f"quant: recipe {recipe.name!r} rounds gradients by a key; pass `key`")
    rows = quantize_activation(x, recipe, axes)
    w = _quantized(weight, recipe)
    saved = None
    if not isinstance(weight, Quantized):
        wgrad = gradients.saved == "wgrad"
        saved = _columns(x, gradients.activation, 1, axes) if wgrad else rows
        saved = checkpoint_name(saved, SAVED)
    product = _scaled if _library_scales(recipe) and len(x) == 1 else matmul
    return product(rows, w, x.dtype), (w, saved, keys)


def _product_bwd(recipe, axes, residuals, dy):
    gradients = recipe.gradients
    w, saved, keys = residuals
    # [part, sample, group, row, out]
    dy = jnp.moveaxis(dy.reshape(*dy.shape[:-1], recipe.parts, -1), -2, 0)
    dgrad_keys, wgrad_keys = _split(keys, recipe)
    parts = range(recipe.parts)
    if isinstance(gradients.dgrad, FP8):
        # Apart, so that XLA sees one scale for each.
        dy_rows = [_quantize(dy[p], gradients.dgrad, 1, axes) for p in parts]
    else:
        dy_rows = _quantize(dy, gradients.dgrad, 2, axes, dgrad_keys)
    w = _transpose(w)
    dx = _add(_scaled(dy_rows[p], w[p : p + 1], dy.dtype) for p in parts).astype(dy.dtype)
    if saved is None:
        return None, dx, None

    if gradients.saved == "wgrad":
        x_columns = saved
    elif gradients.activation is None:
        x_columns = _merge(_swap(saved))
    else:
        x_columns = _columns(saved.dequantize(dy.dtype), gradients.activation, 1, axes)
    samples = range(dy.shape[1])
    if gradients.wgrad is None:
        columns = [_merge(_swap(rows)) for rows in dy_rows]
        dw = [
            _add(matmul(x_columns[i], part[i : i + 1], jnp.float32) for i in samples)
            for part in columns
        ]
        dw = jnp.concatenate(dw, axis=-1)
    else:
        dy_columns = _columns(dy, gradients.wgrad, 2, axes, wgrad_keys)
        dw = _add(matmul(x_columns[i], dy_columns[:, i], jnp.float32) for i in samples)
    return dw.astype(dy.dtype), dx, None


_product.defvjp(_product_fwd, _product_bwd)


def _add(terms):
    return functools.reduce(operator.add, (y.astype(jnp.float32) for y in terms))


def _scaled(x, weight, dtype):
    """`matmul` for what is rounded to dtype next, where a GPU's library multiplies FP8 in float32.

    XLA's GemmRewriter gives that library a factor of its sums that is one number, and drops the
    factor's own rounding to dtype. So sums are scaled, and rounded once, before they are written.
    """
    one = isinstance(x, FP8Tensor) and x.scale.size == weight.scale.size == 1
    if not (one and _multiplies_fp8()):
        return matmul(x, weight, jnp.float32)
    # A number behind a barrier: of an array's, reshaped, the rounding would stay.
    scale = _in_memory(x.scale.reshape(()) * weight.scale.reshape(()))
    return (_sums(x, weight, dtype) * scale.astype(dtype)).reshape(*x.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------
# Operands.


def _quantize(x, fmt: Format, lead: int, axes=(), keys=None) -> Quantized:
    """x [.., n], in blocks or rows along the last axis; its `lead` first axes count tensors.

    keys: [.., group], for tensors and for groups within them; taken if the format is stochastic.
    """
    if isinstance(fmt, FP8):
        return _in_memory(_quantize_fp8(x, fmt, lead, axes))
    if fmt.hadamard:
        x = random_hadamard(x)
    amax = _amax(x, tuple(range(lead, x.ndim)), axes)
    keys = keys if fmt.stochastic else None
    groups = amax.shape if keys is None else keys.shape
    each = jnp.broadcast_to(amax.reshape(amax.shape + (1,) * (len(groups) - lead)), groups)

    tensors = x.reshape(-1, *x.shape[len(groups) :])
    keys = None if keys is None else keys.reshape(-1)
    values, scales = quantize_each(tensors, each.reshape(-1), fmt.rule, fmt.block, keys)
    return NVFP4Tensor(
        values=values.reshape(x.shape),
        scales=scales.reshape(*x.shape[:-1], -1),
        amax=amax,
        rule=fmt.rule,
        block=fmt.block,
        dtype=x.dtype,
    )


def _in_memory(q):
    """A GPU's library takes 8-bit operands that lie in memory.

    Left alone, the compiler draws the quantisation into the product, and then searches for a kernel
    for long.
    """
    return jax.lax.optimization_barrier(q)


def _quantize_fp8(x, fmt, lead, axes):
    if fmt.rows:
        return quantize_rows(x)
    amax = _amax(x, tuple(range(lead, x.ndim)), axes)
    one = functools.partial(quantize_fp8, dtype=jnp.dtype(fmt.dtype))
    for _ in range(lead):
        one = jax.vmap(one)
    return one(x, amax=amax)


def _amax(x, over, axes):
    amax = exact.largest_magnitude(x, over)
    return checkpoint_name(jax.lax.pmax(amax, tuple(axes)) if axes else amax, AMAX)


def _columns(y, fmt, lead, axes, keys=None):
    """y [.., sample, group, row, n] -> wgrad's operand [.., sample, n, group * row].

    Groups are filled up with rows of zeros to whole blocks, so that no block spans two.
    """
    y = jnp.pad(y, ((0, 0),) * (y.ndim - 2) + ((0, -y.shape[-2] % nvfp4.BLOCK), (0, 0)))
    return _merge(_quantize(jnp.swapaxes(y, -1, -2), fmt, lead, axes, keys))


def _swap(q: FP8Tensor) -> FP8Tensor:
    """The last two axes exchanged, of tensors that have one scale each."""
    return q.replace(values=jnp.swapaxes(q.values, -1, -2))


def _merge(q: Quantized) -> Quantized:
    """[.., sample, group, n, row] -> [.., sample, n, group * row]."""

    def one(leaf):
        leaf = jnp.moveaxis(leaf, -3, -2)
        return leaf.reshape(*leaf.shape[:-2], -1)

    if isinstance(q, NVFP4Tensor):
        return q.replace(values=one(q.values), scales=one(q.scales))
    return q.replace(values=one(q.values))


def _transpose(q: Quantized) -> Quantized:
    """A weight [part, out, in] as dgrad's operand [part, in, out]: the same numbers.

    Raises:
      InputError: its scales are of single rows.
    """
    if isinstance(q, FP8Tensor):
        if q.scale.ndim < q.ndim:
            return _swap(q)
    elif q.block == (nvfp4.BLOCK, nvfp4.BLOCK):
        blocks = jnp.swapaxes(q.scales[..., :: nvfp4.BLOCK, :], -1, -2)
        scales = jnp.repeat(blocks, nvfp4.BLOCK, axis=-2)
        return q.replace(values=jnp.swapaxes(q.values, -1, -2), scales=scales)
    raise InputError(
        "quant: a weight quantised by rows has no gradient of its input; quantise it by a recipe "
        "for training, whose blocks are square"
    )


def _quantized(weight, recipe):
    """The forward's operand of a weight that may be one already."""
    if not isinstance(weight, Quantized):
        return quantize_weight(weight, recipe)
    wanted = NVFP4Tensor if isinstance(recipe.weight, NVFP4) else FP8Tensor
    if not isinstance(weight, wanted):
        raise InputError(
            f"quant: the weight is an {type(weight).__name__}, recipe {recipe.name!r} multiplies "
            f"{wanted.__name__}s; quantise the weights by the recipe that is used"
        )
    return weight


def _codes(q: Quantized) -> jax.Array:
    """[..., n] that one scale a row or tensor is missing from, in the dtype to multiply in.

    A 4-bit float times its block's E4M3 scale has 6 significant bits: exact in bfloat16.
    """
    if isinstance(q, FP8Tensor):
        return q.values
    blocks = q.values.astype(jnp.bfloat16).reshape(*q.scales.shape, nvfp4.BLOCK)
    return (blocks * q.scales.astype(jnp.bfloat16)[..., None]).reshape(q.shape)


def _scale(q: Quantized) -> jax.Array:
    """What `_codes` must be multiplied with, float32 [..., 1], of q's rank."""
    if isinstance(q, FP8Tensor):
        scale = q.scale
    else:
        code, scale = nvfp4.RULES[q.rule]
        scale = q.amax / (code * scale)
    return scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim))


def _has_fp4() -> bool:
    """Whether the default device multiplies 4-bit floats with block scales."""
    return _capability() >= 10


def _multiplies_fp8() -> bool:
    """Whether the default device multiplies 8-bit floats."""
    return _capability() >= 8.9


def _capability() -> float:
    """Of an NVIDIA GPU; 0 for any other device."""
    device = jax.local_devices()[0]
    return float(getattr(device, "compute_capability", 0)) if device.platform == "gpu" else 0.0


def backend(recipe: Recipe | None) -> str:
    """How this machine multiplies by the recipe, for people."""
    if recipe is None:
        return "not quantised"
    if isinstance(recipe.weight, NVFP4):
        way = "as they are" if _has_fp4() else "as bfloat16, which holds them exactly"
        return f"{recipe.name}: NVFP4, multiplied {way}"
    way = "as they are" if _multiplies_fp8() else "by the compiler's own conversion"
    return f"{recipe.name}: FP8, multiplied {way}"


# ---------------------------------------------------------------------------------------------
# Keys.


def _keys_of(key, shape):
    """One key for each [sample, group]: groups are what the key's further axes count."""
    if key.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(shape[0]))[:, None]
    if key.shape != shape[: key.ndim]:
        raise InputError(
            f"quant: keys of shape {key.shape} for activations {shape}; they must be one key, or "
            "one for each index of the leading axes"
        )
    return key.reshape(shape[0], -1)


def _split(keys, recipe):
    """Keys [part, sample, group] of dgrad and of wgrad; each layer of a block has its own."""
    if keys is None:
        return None, None
    number = 2 * recipe.parts

    def one(use):
        folded = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, recipe.index), use))
        return folded(keys.reshape(-1)).reshape(keys.shape)

    keys = jax.vmap(one)(jnp.arange(number))
    return keys[: recipe.parts], keys[recipe.parts :]
