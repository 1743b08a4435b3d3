"""How long a run is, and when it logs, saves and evaluates."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of `section` of the config; each is described there."""

    section: str
    steps: int
    save_every: int
    log_every: int = 1
    keep_last: int = 1
    keep_every: int = 0
    eval_every: int = 0
    max_bad_steps: int = 1

    @classmethod
    def of(cls, section: Any) -> "Plan":
        """From a section of the config, which may lack what has a default."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(section.NAME, **{k: v for k, v in vars(section).items() if k in names})
