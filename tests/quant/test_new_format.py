"""A number format is one file: INT8 with a scale a row, in a recipe, in the cache, between devices.

What the package itself would have as `formats/int8.py`, and two entries in `recipes.py`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes
from longlive_jax.checkpoints import quantized
from longlive_jax.errors import InputError
from longlive_jax.formats import Format, Quantized, exact
from longlive_jax.models import dit
from longlive_jax.quant import weights
from longlive_jax.quant.linear import linear, quantize_weight
from tests.quant.test_linear import error, layer, tokens
from tests.sampling import test_quantized_sampling as sampling


@struct.dataclass
class Int8Tensor(Quantized):
    """values: int8 [..., n]. scale: float32 [..., 1]."""

    values: jax.Array
    scale: jax.Array
    dtype: np.dtype = struct.field(pytree_node=False)

    def operand(self) -> jax.Array:
        return self.values.astype(jnp.bfloat16)  # exact

    def factor(self) -> jax.Array:
        return self.scale


@dataclasses.dataclass(frozen=True)
class Int8(Format):
    """Integers of 8 bits, to nearest even."""

    title: ClassVar[str] = "INT8"
    tensor: ClassVar[type[Quantized]] = Int8Tensor

    def quantize(self, x, *how) -> Int8Tensor:
        scale = jnp.maximum(exact.largest_magnitude(x, -1, keepdims=True) / 127, exact.TINY)
        values = jnp.round(exact.round_input(x) / scale).astype(jnp.int8)
        return Int8Tensor(values=values, scale=scale, dtype=x.dtype)


RECIPE = recipes.Recipe("int8", activation=Int8(), weight=Int8())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "int8", RECIPE)
    for names in (recipes.KV_FORMATS, recipes.PAYLOADS):
        monkeypatch.setitem(names, "int8", Int8())


def test_the_tensor():
    x = tokens(3, 1, 16, 64)
    q = Int8().quantize(x)
    assert error(q.dequantize(), x) < 0.01 and q.dequantize().dtype == x.dtype
    np.testing.assert_array_equal(q.merged().dequantize(), q.dequantize()[:, 0])
    np.testing.assert_array_equal(q.pack().unpack().values, q.values)
    assert q.is_finite() and not Int8().quantize(x.at[0].set(jnp.nan)).is_finite()
    with pytest.raises(InputError, match="quantised by rows has no gradient"):
        q.transposed()


def test_a_layer():
    p, x, r = layer(64, 96), tokens(2, 32, 64), RECIPE.at("self_attn.qkv")
    y = linear(p, x, r)
    assert 0 < error(y, linear(p, x)) < 0.015
    stored = p | {"weight": quantize_weight(p["weight"], r)}
    np.testing.assert_array_equal(linear(stored, x, r), y)


def test_weights_and_what_lies_on_disk():
    specs = dit.spec(sampling.MODEL)
    tree = weights.quantize_params(params_lib.init(specs, jax.random.key(0)), specs, RECIPE)
    quantized.check(tree, "here")
    on_disk = params_lib.flatten(quantized.spec(specs, RECIPE))
    for path, array in params_lib.flatten(weights.as_dicts(tree)).items():
        assert on_disk[path].shape == array.shape


@pytest.mark.parametrize(
    "settings",
    [
        {"kv": "int8"},
        pytest.param({"all_to_all": "int8"}, marks=pytest.mark.slow),
        {"recipe": "int8", "kv": "int8"},
    ],
    ids=str,
)
def test_a_sampler(settings):
    mesh = config_lib.Mesh(seq=2) if "all_to_all" in settings else config_lib.Mesh()
    plain = sampling.make_config("bf16", mesh=mesh)
    cfg = dataclasses.replace(plain, quant=config_lib.Quant(**settings))
    latents, want = (sampling.run.__wrapped__(c, chunks=2) for c in (cfg, plain))
    assert 0 < error(latents, want) < 0.05
