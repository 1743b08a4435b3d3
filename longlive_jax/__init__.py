"""Streaming multi-shot video generation (LongLive-2.0) in JAX.

    pipeline = longlive_jax.Pipeline.from_checkpoint("CKPT")

`Pipeline`, `Session`, `Config` and `load_config` are imported when they are first used, so that the
kernels can be imported alone.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longlive_jax.config import Config, load_config
    from longlive_jax.pipeline import Pipeline
    from longlive_jax.sampling.session import Session

_HOMES = {
    "Config": "config",
    "Pipeline": "pipeline",
    "Session": "sampling.session",
    "load_config": "config",
}
__all__ = ["Config", "Pipeline", "Session", "load_config"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
