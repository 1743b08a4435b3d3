"""The quantised linear layer: three products, each of two quantised tensors.

All quantised operands have the layout of tensor cores, with the contracted axis last:
activations [sample, ..., in], weights [part, out, in]. `part` counts the original's matrices that
a fused weight is made of. Each sample and each part is a tensor of its own, with its own largest
magnitude, so that a sample's result does not depend on the rest of the batch; devices that share a
sample use the largest of their magnitudes.

Where nothing is quantised `ops.linear` runs, and nothing here does.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul, Quantized, exact
from longlive_jax.kernels.chip import is_hopper
from longlive_jax.ops import linear as plain
from longlive_jax.quant import operands
from longlive_jax.quant.adapted import Adapted
from longlive_jax.quant.matmul import is_native, matmul, scaled, scales_of_rows, unscaled
from longlive_jax.recipes import Recipe

SAVED = "quantized"  # name, for `jax.checkpoint`, of the activation saved for wgrad


def linear(
    params: Mapping[str, Any],
    x: jax.Array | Quantized,
    recipe: Recipe | None = None,
    key: jax.Array | None = None,
    axes: Sequence[str] = (),
) -> jax.Array:
    """x [sample, ..., in] @ weight [in, out] + bias [out], in the formats of the recipe.

    The bias is added after the product's rounding to x's dtype, as in the original; for FP8
    with a gradient a GPU's library adds it before. Gradients have the dtypes of x, weight and bias.
    A weight that is already quantised has none.

    Args:
      params: weight: [in, out], or `quantize_weight` of one, or `Adapted`, either with adapters;
        bias: [out].
      x: activations, or `quantize_activation` of them, which several layers may share.
      recipe: of this layer, see `Recipe.at`; None: `ops.linear`.
      key: for recipes that round gradients stochastically: one key, or an array of keys for
        leading axes of x. With a key for each sample and chunk, gradients do not depend on how
        these are spread over devices. The layer's number is folded in here.
      axes: mesh axes, inside a manual `jax.shard_map`, that shard a sample.

    Raises:
      InputError: sides that are no multiple of 16 (NVFP4); a weight quantised in another format; a
        gradient by a recipe for inference, without its key, or through a weight quantised by rows.
    """
    if isinstance(params["weight"], Adapted):
        return _adapted(params, x, recipe, key, axes)
    if recipe is None:
        assert not isinstance(x, Quantized)
        return plain.linear(params, x)
    weight, bias = params["weight"], params["bias"]
    if isinstance(x, Quantized):
        y = _forward(recipe, operands.in_memory(x), weight)
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
    params: Mapping[str, Any],
    x: jax.Array | Quantized,
    recipe: Recipe | None = None,
    key: jax.Array | None = None,
    axes: Sequence[str] = (),
) -> jax.Array | PendingMatmul:
    """`linear` for callers that take a `PendingMatmul`: in inference a kernel may finish it.

    That is on a Hopper GPU. Anywhere else, and with a gradient, it is `linear`, which rounds the
    product before it adds the bias; a kernel that finishes a PendingMatmul rounds once.

    Args and raises: as `linear`.
    """
    alone = isinstance(params["weight"], Adapted) or not is_hopper()
    if recipe is None or recipe.gradients is not None or alone:
        return linear(params, x, recipe, key, axes)
    if not isinstance(x, Quantized):
        x = quantize_activation(x, recipe, axes)
    weight = _quantized(params["weight"], recipe)
    sums = unscaled(operands.in_memory(x), weight, x.dtype)
    return PendingMatmul(
        sums=sums.reshape(*x.shape[:-1], -1),
        row=scales_of_rows(x),
        column=scales_of_rows(weight).reshape(-1),
        bias=params["bias"].astype(x.dtype),
    )


def _adapted(params, x, recipe, key, axes):
    """`linear` of an Adapted weight. Its base and the bias are frozen; adapters are in x's dtype.

    If x is quantised already, the adapters read it dequantised.
    """
    weight: Adapted = params["weight"]
    base, bias = jax.lax.stop_gradient((weight.base, params["bias"]))
    if recipe is not None and not isinstance(base, Quantized):
        # A weight that is quantised has no wgrad, and no activation is kept for one.
        base = quantize_weight(base.astype(x.dtype), recipe)
    y = linear({"weight": base, "bias": bias}, x, recipe, key, axes)
    if isinstance(x, Quantized):
        x = operands.dequantize(x, y.dtype)
    return y + weight.product(x)


def quantize_activation(x: jax.Array, recipe: Recipe, axes: Sequence[str] = ()) -> Quantized:
    """x [sample, ..., in] as the forward's operand: a tensor for each sample.

    Args: as `linear`.
    """
    return operands.quantize(recipe.activation, x, 1, axes)


def quantize_weight(weight: jax.Array, recipe: Recipe) -> Quantized:
    """A whole weight [in, out] as the forward's operand [part, out / part, in].

    Raises:
      InputError: sides that the format's blocks do not divide.
    """
    parts = weight.T.reshape(recipe.parts, -1, weight.shape[0])
    return operands.quantize(recipe.weight, parts, 1)


def _library_scales(recipe):
    """Whether a GPU's library applies scales and bias itself: with one scale an operand."""
    one = recipe.weight.per_tensor and recipe.parts == 1
    return one and recipe.gradients is not None and is_native(recipe.weight)


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
    # Of the array that the product's gradient quantises, or XLA would keep dy in float32 for this.
    return dy, jnp.sum(exact.round_input(dy), axis=range(dy.ndim - 1)).astype(dy.dtype)


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


# ---------------------------------------------------------------------------------------------
# The product and its gradient. Tokens are [sample, group, row, in] with a key for each group.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(recipe, axes, weight, x, keys):
    del keys
    return _forward(recipe, quantize_activation(x, recipe, axes), weight)


def _forward(recipe, x, weight):
    # For inference, sums of 4-bit codes may be rounded, as sums of 8-bit ones are.
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
        saved = operands.columns(gradients.activation, x, 1, axes) if wgrad else rows
        saved = checkpoint_name(saved, SAVED)
    product = scaled if _library_scales(recipe) and len(x) == 1 else matmul
    return product(rows, w, x.dtype).astype(x.dtype), (w, saved, keys)


def _product_bwd(recipe, axes, residuals, dy):
    gradients = recipe.gradients
    w, saved, keys = residuals
    # [part, sample, group, row, out]
    dy = jnp.moveaxis(dy.reshape(*dy.shape[:-1], recipe.parts, -1), -2, 0)
    dgrad_keys, wgrad_keys = _split(keys, recipe)
    parts = range(recipe.parts)
    if gradients.dgrad.per_tensor:
        # Apart, so that XLA sees one scale for each.
        dy_rows = [operands.quantize(gradients.dgrad, dy[p], 1, axes) for p in parts]
    else:
        dy_rows = operands.quantize(gradients.dgrad, dy, 2, axes, dgrad_keys)
    w = w.transposed()
    dx = _add(scaled(dy_rows[p], w[p : p + 1], dy.dtype) for p in parts).astype(dy.dtype)
    if saved is None:
        return None, dx, None

    if gradients.saved == "wgrad":
        x_columns = saved
    elif gradients.activation is None:
        x_columns = saved.transposed().merged()
    else:
        x = operands.dequantize(saved, dy.dtype)
        x_columns = operands.columns(gradients.activation, x, 1, axes)
    samples = range(dy.shape[1])
    if gradients.wgrad is None:
        assert isinstance(dy_rows, list)  # one scale a tensor: `Gradients` says so
        columns = [rows.transposed().merged() for rows in dy_rows]
        dw = [
            _add(matmul(x_columns[i], part[i : i + 1], jnp.float32) for i in samples)
            for part in columns
        ]
        dw = jnp.concatenate(dw, axis=-1)
    else:
        dy_columns = operands.columns(gradients.wgrad, dy, 2, axes, wgrad_keys)
        dw = _add(matmul(x_columns[i], dy_columns[:, i], jnp.float32) for i in samples)
    return dw.astype(dy.dtype), dx, None


_product.defvjp(_product_fwd, _product_bwd)


def _add(terms):
    return functools.reduce(operator.add, (y.astype(jnp.float32) for y in terms))


def _quantized(weight, recipe):
    """The forward's operand of a weight that may be one already."""
    if not isinstance(weight, Quantized):
        return quantize_weight(weight, recipe)
    wanted = recipe.weight.tensor
    if not isinstance(weight, wanted):
        raise InputError(
            f"quant: the weight is an {type(weight).__name__}, recipe {recipe.name!r} multiplies "
            f"{wanted.__name__}s; quantise the weights by the recipe that is used"
        )
    return weight


# ---------------------------------------------------------------------------------------------
# Keys.


def _keys_of(key, shape):
    """One key for each [sample, group]; the key's further axes count groups."""
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
