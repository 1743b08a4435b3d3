"""The branches of each kind of action path, and where in a block they are."""

import functools

from longlive_jax import config as config_lib
from longlive_jax.models.actions import module, token
from longlive_jax.models.branch import Branch


@functools.cache  # equal branches are one object, as functions that are compiled for them need
def branches(cfg: config_lib.Actions) -> tuple[tuple[Branch, str], ...]:
    """Each branch of a config, and the name of the branch that it is inserted before."""
    if cfg.kind == "module":
        return tuple((branch, "ffn") for branch in module.branches(cfg))
    if cfg.kind == "token":
        return ((token.branch(cfg), "self_attention"),)
    return ()
