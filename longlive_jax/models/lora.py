"""Low-rank adapters of the transformer as a second tree (LoRA, arXiv 2106.09685).

    adapters = params.init(lora.specs(dit.spec(cfg.model), settings), key, mesh=mesh)
    velocity = dit.teacher_forcing(lora.attach(base, adapters, settings.scale), ...)

The tree has the paths of the transformer's, with {a, b} for each adapted linear layer; see
`quant.adapted` for their shapes. It is trained, averaged, sharded and stored like any other. With
`attach` a forward reads one base, plain or quantised, for any number of adapters; `merge` makes a
copy of the weights with the adapters added up.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.formats import Quantized
from longlive_jax.quant import adapted
from longlive_jax.quant.adapted import Adapted
from longlive_jax.recipes import LINEARS

_BLOCKS = "blocks"


def specs(dit_specs: params_lib.Tree, settings: config_lib.LoRA) -> params_lib.Tree:
    """The specs of the adapters of a transformer with these specs.

    A is drawn as PEFT draws it, uniform within 1 / sqrt(in), and B is zero: a new adapter changes
    nothing.
    """
    plain = params_lib.flatten(dit_specs)
    result = {}
    for path in settings.paths:
        where = _where(path)
        weight = plain[(*where, "weight")]
        one = params_lib.layer_of(weight)
        own = adapted.specs(one, LINEARS[path], settings.rank)  # pyright: ignore[reportArgumentType]
        stacked = params_lib.stack(own, weight.shape[0])
        result |= {(*where, name): spec for name, spec in stacked.items()}
    return params_lib.unflatten(result)


def attach(params: params_lib.Tree, adapters: params_lib.Tree, scale: float) -> params_lib.Tree:
    """The transformer's parameters with adapters beside the weights, which are frozen.

    Works on arrays, whole or this device's shards inside a manual `shard_map`, on specs, and on
    `jax.ShapeDtypeStruct`s. All functions of `models.dit` take the result; `dit.layers` too.

    Args:
      params: of `dit.spec`, layers stacked; weights plain or quantised. Without a gradient.
      adapters: of `specs`. They alone have a gradient.
      scale: alpha / rank, `config.LoRA.scale`.

    Raises:
      InputError: adapters are of a layer that the parameters lack, or have adapters already.
    """
    leaves = jax.tree.map(_frozen, params, is_leaf=params_lib.is_spec)
    leaves = params_lib.flatten(leaves)
    for where, pair in _pairs(adapters):
        weight = _weight(leaves, where)
        if isinstance(weight, Adapted):
            raise InputError(f"lora: {_name(where)} has adapters already; merge them first")
        leaves[*where, "weight"] = Adapted(weight, pair["a"], pair["b"], float(scale))
    return params_lib.unflatten(leaves)


def merge(
    params: params_lib.Tree, adapters: params_lib.Tree, scale: float, dtype: Any = None
) -> params_lib.Tree:
    """The transformer's parameters with adapters added up: W + scale A B, in float32, rounded once.

    On global arrays, of any mesh; the result is sharded as `params` are. The parameters have no
    gradient, the adapters have theirs.

    Args:
      params: of `dit.spec`, plain.
      dtype: of merged weights; None: their own.

    Raises:
      InputError: as `attach`; or a weight is quantised.
    """
    leaves = params_lib.flatten(jax.tree.map(_frozen, params))
    for where, pair in _pairs(adapters):
        weight = _weight(leaves, where)
        if isinstance(weight, Quantized | Adapted):
            raise InputError(
                f"lora: {_name(where)} is an {type(weight).__name__}, which adapters cannot be "
                "merged into; merge them into the weights that it was made of, or attach them"
            )
        leaves[*where, "weight"] = _merged(weight, pair["a"], pair["b"], scale, dtype)
    return params_lib.unflatten(leaves)


def unmerge(
    params: params_lib.Tree, adapters: params_lib.Tree, scale: float, dtype: Any = None
) -> params_lib.Tree:
    """The inverse of `merge`, to rounding: exact to 1e-6 for float32, not for less."""
    return merge(params, adapters, -scale, dtype)


def _merged(weight, a, b, scale, dtype):
    """Layer by layer, so that no stack of products is in memory."""
    where = jax.typeof(weight).sharding
    _, into, out = where.spec
    if into or out:  # both factors may lie over the same mesh axes: their product is as the weight
        where = jax.NamedSharding(where.mesh, jax.P(into, None, out))
    else:
        where = None

    def one(stacked):
        w, a, b = stacked
        product = jnp.einsum("ipr,pro->ipo", a, b, out_sharding=where)
        total = w.astype(jnp.float32) + scale * product.reshape(w.shape)
        return total.astype(dtype or w.dtype)

    return jax.lax.map(one, (weight, a.astype(jnp.float32), b.astype(jnp.float32)))


def _pairs(adapters: params_lib.Tree):
    """Path of each adapted layer, and its {a, b}."""
    pairs: dict[params_lib.Path, dict[str, Any]] = {}
    for path, leaf in params_lib.flatten(adapters).items():
        pairs.setdefault(path[:-1], {})[path[-1]] = leaf
    return pairs.items()


def _weight(leaves: Mapping[params_lib.Path, Any], where: params_lib.Path) -> Any:
    weight = leaves.get((*where, "weight"))
    if weight is None:
        raise InputError(f"lora: {_name(where)} is no layer of this transformer")
    return weight


def _where(path: str) -> params_lib.Path:
    return (_BLOCKS, *path.split("."))


def _name(where: params_lib.Path) -> str:
    return "/".join((*where, "weight"))


def _frozen(x):
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x
