"""Meshes for 8 to 4,096 devices, and what the formulas say of each."""

import dataclasses
import math

from longlive_jax import config as config_lib
from longlive_jax.scaling import memory, roofline, traffic
from longlive_jax.scaling.chips import Chip

SIZES = (8, 64, 512, 4096)
STORAGE_RATE = 1e9  # bytes/s of a host to and from storage: an assumption, not a measurement
TRIED_BATCH = 16  # videos a step in the paper: arXiv 2605.18739, implementation


@dataclasses.dataclass(frozen=True)
class Plan:
    """A mesh of chips for the training step of `cfg`."""

    chip: Chip
    cfg: config_lib.Config

    @property
    def devices(self) -> int:
        return self.cfg.mesh.size

    @property
    def hosts(self) -> int:
        return math.ceil(self.devices / self.chip.host)

    def times(self) -> roofline.Times:
        return roofline.times(self.cfg, self.chip)

    def sent(self) -> traffic.Sent:
        return traffic.by_link(self.cfg, self.chip)

    def save_seconds(self) -> float:
        """Every host writes an equal part of the state (`use_replica_parallel` of Orbax)."""
        return memory.saved(self.cfg) / self.hosts / STORAGE_RATE

    def restore_seconds(self) -> float:
        """Every host reads what lies on its devices."""
        return self.restored() / STORAGE_RATE

    def restored(self) -> int:
        """Bytes that one host reads."""
        return memory.restored(self.cfg, min(self.chip.host, self.devices))


def plan(base: config_lib.Config, chip: Chip, devices: int, fsdp: int, seq: int) -> Plan:
    """`base` on so many devices, one video on each fsdp x data of them: the smallest batch."""
    mesh = config_lib.Mesh(data=devices // (fsdp * seq), fsdp=fsdp, seq=seq)
    train = dataclasses.replace(base.train, batch_size=mesh.data * mesh.fsdp)
    return Plan(chip, dataclasses.replace(base, mesh=mesh, train=train))
