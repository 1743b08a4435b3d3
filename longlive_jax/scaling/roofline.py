"""The least time of a training step: work of a device, divided by the rates of its data sheet."""

import math
from typing import NamedTuple

from longlive_jax import config as config_lib
from longlive_jax.scaling import memory, traffic
from longlive_jax.scaling.chips import Chip
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import cost


class Times(NamedTuple):
    """Seconds of a step, each as if the device did nothing else.

    compute: matrix products. memory: bytes between the chip and its memory. inner, outer: links
    inside a domain, and between domains.
    """

    compute: float
    memory: float
    inner: float
    outer: float

    @property
    def floor(self) -> float:
        """If all but the slowest were hidden behind it."""
        return max(self)

    @property
    def unhidden(self) -> float:
        """If no communication were hidden behind computation."""
        return max(self.compute, self.memory) + self.inner + self.outer

    @property
    def bound(self) -> str:
        """The name of the slowest."""
        return self._fields[self.index(max(self))]


def times(cfg: config_lib.Config, chip: Chip) -> Times:
    """Of one step on every device of the mesh. Errors as `traffic.step`."""
    sent = traffic.by_link(cfg, chip)
    return Times(
        compute=flops(cfg, chip) / chip.peak,
        memory=moved(cfg) / chip.bandwidth,
        inner=sent.inner / chip.inner.rate,
        outer=sent.outer / chip.outer.rate,
    )


def flops(cfg: config_lib.Config, chip: Chip) -> float:
    """FLOPs that a device does in a step: the model's, what its blocks compute again, and what the
    kernels of attention's backward compute again.
    """
    m, train = cfg.model, cfg.train
    copies, chunks = 2 if train.teacher_forcing else 1, batch_lib.chunks(cfg)
    pairs = copies * (chunks**2 + chunks) // 2 * (m.chunk_frames * cfg.video.patches) ** 2
    product = 2 * m.dim * pairs * m.num_layers * train.batch_size * train.accumulation
    again = cost.recomputed_flops(cfg) + (chip.attention_products - 4) * product
    return (cost.step_flops(cfg) + again) / cfg.mesh.size


def moved(cfg: config_lib.Config) -> float:
    """Bytes that a device moves to or from its memory in a step, at the least.

    The state once, weights as they are gathered and used, operands and results of every product,
    and what attention reads and writes, once each; in the forward, again as the backward computes
    the block again, and of the gradients. Attention that reads its keys once for each tile of
    queries, norms, gates and copies come on top.
    """
    m, d = cfg.model, cfg.model.dim
    size = cfg.compute_dtype.itemsize
    parameters = sum(n * math.prod(spec.shape) for _, n, spec in traffic.leaves(cfg))
    # Float32, read and written.
    state = memory.copies(cfg) * 2 * 4 * parameters / (cfg.mesh.fsdp * cfg.mesh.seq)
    # Gathered: written once a pass, read by the forward; by the recomputation and the gradient.
    weights = parameters * (5 * size + 2 * 4)  # and a float32 gradient, written and read
    products = (1 + 3) * d + 2 * d + 4 * d + 2 * (d + m.ffn_dim)  # qkv, o; q, o; the FFN's two
    attention, backward = 4 * d + 2 * d, 8 * d + 4 * d  # itself; the text, whose keys are few
    a_token = 2 * (products + attention) + 2 * products + backward
    tokens = traffic.local_tokens(cfg) * cfg.train.accumulation
    return state + weights * cfg.train.accumulation + m.num_layers * tokens * a_token * size
