"""The branches of a transformer block, each of which adds to the hidden states.

A branch is data: a parameter spec, a function of hidden states and, if its chunks attend to each
other, an `Attention`. A branch for another kind of conditioning is a file of its own. `insert`
puts it among a block's branches; the block itself does not change.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models.precision import Operand, Precision, Result
from longlive_jax.models.sharding import Sharding
from longlive_jax.ops import residual

if TYPE_CHECKING:
    from longlive_jax.models.dit.conditioning import BlockModulation, Conditioning


@struct.dataclass
class Hidden:
    """Hidden states [batch, chunk, (copy,) frame, patch, dim]: x + gate * y, y not added yet.

    The next norm adds it (`Layer.norm`): on a GPU sum, norm and FP8 rows are one kernel.

    x: compute dtype.
    y: None: nothing is pending; else an array or a PendingMatmul.
    gate: float32, broadcasts against x; None: 1.
    """

    x: jax.Array
    y: Result | None = None
    gate: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    def add(self, y: Result, gate: jax.Array | None = None) -> "Hidden":
        """These hidden states + gate * y."""
        return Hidden(self.array(), y, gate)

    def array(self) -> jax.Array:
        """The hidden states as one array."""
        return self.x if self.y is None else residual.add(self.x, self.y, self.gate)


class Attention(NamedTuple):
    """How a branch's chunks attend to each other, including the exchange between devices.

    The branch's own functions agree on the shapes of queries, keys, values and results;
    self-attention's are [batch, chunk, (copy,) token, head, head_dim].

    teacher_forcing, block_causal: (q, k, v, sharding) -> out, in training.
    windowed: (q, k, v, sharding, visible) -> out: teacher forcing of videos longer than the
      window, `visible` as `ops.windowed` takes it.
    over_past: (q, k, v, sharding, past, visible) -> out, (k, v), of one copy of the video, as
      `ops.windowed.over_past`; past is what the clean copy's call returned, None in that call.
      None: in teacher forcing without gradient to the past both copies are computed together.
    streaming: (q, k, v, sharding, past) -> out, of one chunk; `past(q, k, v)` is the `attend` of
      the branch's cache, and in the clean pass its `write` too.
    """

    teacher_forcing: Callable[..., jax.Array]
    block_causal: Callable[..., jax.Array]
    windowed: Callable[..., jax.Array]
    streaming: Callable[..., jax.Array]
    over_past: Callable[..., tuple[jax.Array, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Branch:
    """One line of a block: hidden states in, hidden states out.

    name: in profiles; its cache and its conditioning have the same name.
    spec: its parameters, by their names in a block; no other branch has one of these names.
    apply: (the block's parameters, hidden states, layer) -> hidden states.
    layers: how many layers, from the first on, have it; None: all.
    attention: None: a chunk sees only itself. Otherwise the branch has a cache in streaming.
    """

    name: str
    spec: Callable[[config_lib.Model], params_lib.Tree]
    apply: Callable[[params_lib.Tree, Hidden, "Layer"], Hidden]
    layers: int | None = None
    attention: Attention | None = None


def insert(branches: tuple[Branch, ...], new: Branch, *, before: str) -> tuple[Branch, ...]:
    """`branches` with `new` before the branch named `before`.

    Raises:
      InputError: no branch is named `before`, or one has the name of `new`.
    """
    names = [branch.name for branch in branches]
    if before not in names or new.name in names:
        raise InputError(
            f"branch {new.name!r} before {before!r}: the block's branches are {', '.join(names)}; "
            "insert before one of them, under another name"
        )
    place = names.index(before)
    return (*branches[:place], new, *branches[place:])


@dataclasses.dataclass(frozen=True)
class Layer:
    """The layer that a branch is applied in, as the branch sees it.

    given: the layer's conditioning; its `inserted` is for inserted branches.
    attend: (name of a branch, q, k, v) -> out: that branch's `attention`.
    key: keys [batch, chunk] of this layer, for recipes that round gradients stochastically.
    modulation: of this layer; set by the block.
    """

    cfg: config_lib.Model
    sharding: Sharding
    precision: Precision
    given: "Conditioning | None" = None
    attend: Callable[..., jax.Array] | None = None
    key: jax.Array | None = None
    modulation: "BlockModulation | None" = None

    def norm(self, path: str, x: Hidden, scale, shift) -> tuple[Hidden, Operand]:
        """x with its pending sum added; norm(x) * scale + shift for the linear layer at `path`."""
        if x.y is None:
            return x, self.precision.layer_norm(path, x.x, scale, shift)
        total, h = self.precision.add_layer_norm(
            path, x.x, x.y, gate=x.gate, scale=scale, shift=shift
        )
        return Hidden(total), h

    def linear(self, block: params_lib.Tree, path: str, x: Operand) -> jax.Array:
        """The block's linear layer at this path, a key of `recipes.LINEARS`."""
        return self.precision.linear(block, path, x, self.key, self._axes)

    def product(self, block: params_lib.Tree, path: str, x: Operand) -> Result:
        """`linear`, whose scales and bias may be left to the operation that takes the result."""
        return self.precision.product(block, path, x, self.key, self._axes)

    @property
    def _axes(self):
        """Mesh axes that shard a sample's tokens; their devices agree on the scales of a tensor."""
        return () if self.sharding.seq_axis is None else (self.sharding.seq_axis,)
