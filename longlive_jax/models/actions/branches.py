"""The branches of each kind of action path, and where in a block they are."""

import functools
from typing import Any

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
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


def split(tree: params_lib.Tree, cfg: config_lib.Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """The backbone and the action path of a transformer's tree of anything, layers stacked.

    Both keep the paths of the whole; without an action path the second is empty.
    """
    names = {name for branch, _ in branches(cfg.actions) for name in branch.spec(cfg)}
    blocks = tree["blocks"]
    path = {name: blocks[name] for name in blocks if name in names}
    rest = {name: blocks[name] for name in blocks if name not in names}
    return {**tree, "blocks": rest}, {"blocks": path} if path else {}


def join(tree: params_lib.Tree, path: params_lib.Tree) -> dict[str, Any]:
    """The transformer with this action path, of `split`, in place of its own if it has one."""
    if not path:
        return dict(tree)
    return {**tree, "blocks": {**tree["blocks"], **path["blocks"]}}
