"""Settings of the device mesh."""

import dataclasses

from longlive_jax.config.section import Count, Section


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
    """Sizes of the device mesh's axes; their product is the number of devices used."""

    NAME = "mesh"

    data: Count = 1
    fsdp: Count = 1
    seq: Count = 1

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.seq
