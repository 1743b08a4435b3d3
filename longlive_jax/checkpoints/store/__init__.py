"""Our checkpoint of weights: a directory of small Orbax checkpoints, one a layer, and two indices.

    CKPT/metadata.json     the networks, their sources and their configs
    CKPT/dit/index.json    shape and dtype of each array, and the group of each of its rows
    CKPT/dit/blocks_07/    a group: an Orbax checkpoint of one layer's rows of the stacked arrays
    CKPT/dit/rest/         arrays outside the layers
    CKPT/tokenizer.json

The caller who saves a network names it: the commands look for "dit", "vae" and "umt5"; a critic, a
student or the adapters of a LoRA lie beside them under names of their own.

Neither writer nor reader ever has a whole stacked array on the host. A group may have any rows of
any array: one that has all of them is a stacked checkpoint, and loads just the same.
`metadata.json` is replaced in one step when a network is whole, so that a directory is never
half-written.
"""

from longlive_jax.checkpoints.layout import Piece
from longlive_jax.checkpoints.store.reader import Stored, load, load_or_init, parts, sources
from longlive_jax.checkpoints.store.writer import (
    Summary,
    copy,
    save,
    save_tokenizer,
    save_tree,
    tree_pieces,
)

__all__ = [
    "Piece",
    "Stored",
    "Summary",
    "copy",
    "load",
    "load_or_init",
    "parts",
    "save",
    "save_tokenizer",
    "save_tree",
    "sources",
    "tree_pieces",
]
