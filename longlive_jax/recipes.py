"""Quantisation recipes: which number format each product of a transformer block is computed in.

A linear layer is one matrix product in a forward and two more in its gradient:

  forward   y = x w         x with `activation`, w with `weight`
  dgrad     dx = dy w^T     dy with `gradients.dgrad`, w as in the forward
  wgrad     dw = x^T dy     x with `gradients.activation`, dy with `gradients.wgrad`

In the original 300 layers of 30 blocks are quantised, here the seven of `LINEARS` in each block.
Everything else (embeddings, head, norms, rotations, softmax) stays as it is.
"""

import dataclasses
import math

from longlive_jax.errors import InputError
from longlive_jax.formats import FP8, NVFP4, Format, FP8Pair

# Path of each quantised layer within a block, and how many of the original's matrices its weight
# is made of: each is quantised as a tensor of its own, with its own largest magnitude.
LINEARS = {
    "self_attn.qkv": 3,
    "self_attn.o": 1,
    "cross_attn.q": 1,
    "cross_attn.kv": 2,
    "cross_attn.o": 1,
    "ffn.0": 1,
    "ffn.2": 1,
}


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Formats of the two products of a gradient.

    wgrad, activation: None: the tensor of dgrad or of the forward is reused, transposed, as a
      format with one scale a tensor allows.
    saved: the form of x that is kept for wgrad. "forward": the forward's tensor, dequantised and
      quantised again; "wgrad": the operand of wgrad, made of x itself.
    """

    dgrad: Format
    wgrad: Format | None = None
    activation: Format | None = None
    saved: str = "forward"

    @property
    def stochastic(self) -> bool:
        return any(f is not None and f.stochastic for f in (self.dgrad, self.wgrad))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The formats of one linear layer, or of all. `gradients`: None: for inference alone.

    parts, index: set by `at`: the layer's number of matrices, and its place, in `LINEARS`.
    """

    name: str
    activation: Format
    weight: Format
    gradients: Gradients | None = None
    parts: int = 1
    index: int = 0

    def at(self, path: str) -> "Recipe":
        """The recipe of the block's layer at this path, a key of `LINEARS`."""
        return dataclasses.replace(self, parts=LINEARS[path], index=tuple(LINEARS).index(path))

    @property
    def by_rows(self) -> bool:
        """Whether the operation that computes an activation quantises it by rows (`ops.quantized`).

        For inference alone: a gradient needs the activation itself.
        """
        return self.gradients is None and self.activation.fused

    @property
    def multiple(self) -> int:
        """The sides of activations and weights must be multiples of this number."""
        return math.lcm(self.activation.multiple, self.weight.multiple)


def _nvfp4(name: str, weight: str, rule: str = "mse", saved: str = "forward") -> Recipe:
    """A recipe for training, with one scale rule for weights and one for all else.

    Square blocks, so that a weight and its transpose have the same numbers. Gradients are rounded
    stochastically, and both operands of wgrad go through the Hadamard transform.
    """
    return Recipe(
        name,
        activation=NVFP4(rule),
        weight=NVFP4(weight, (16, 16)),
        gradients=Gradients(
            dgrad=NVFP4(rule, stochastic=True),
            wgrad=NVFP4(rule, hadamard=True, stochastic=True),
            activation=NVFP4(rule, hadamard=True),
            saved=saved,
        ),
    )


_TABLE = (
    # Weights and activations with a scale for each output channel and token.
    Recipe("fp8", activation=FP8(rows=True), weight=FP8(rows=True)),
    # Range matters more than precision in gradients: E5M2.
    Recipe("fp8_train", FP8(), FP8(), Gradients(dgrad=FP8("float8_e5m2"))),
    # The original's: wgrad quantises the dequantised activation a second time.
    _nvfp4("nvfp4_ar", "static_6"),
    _nvfp4("nvfp4_dmd", "mse"),
    # As the original exports: blocks of one row, whatever blocks training had.
    Recipe("nvfp4_w4a4", NVFP4("mse"), NVFP4("mse")),
    # Transformer Engine's defaults: both operands of wgrad are made of unquantised tensors.
    _nvfp4("nvfp4_te", "static_6", "static_6", saved="wgrad"),
)
# The values of `quant.recipe`, `quant.kv` and `quant.all_to_all`; None: nothing is quantised.
RECIPES: dict[str, Recipe | None] = {"bf16": None} | {recipe.name: recipe for recipe in _TABLE}
KV_FORMATS: dict[str, Format | None] = {"bf16": None, "fp8": FP8Pair(), "nvfp4": NVFP4("mse")}
PAYLOADS: dict[str, Format | None] = {"bf16": None, "nvfp4": NVFP4("mse")}


def get(name: str) -> Recipe | None:
    """The recipe of this name; None for "bf16", which quantises nothing.

    Raises:
      InputError: there is none.
    """
    if name not in RECIPES:
        raise InputError(f"quant: unknown recipe {name!r}; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]
