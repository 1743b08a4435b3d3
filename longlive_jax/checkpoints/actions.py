"""The action module of Matrix-Game 2 and 3 in files: what their files have besides our arrays.

Our arrays have the original's names, `blocks.{i}.action_model.*`. Beside them lie the weights of
four norms, which the original neither multiplies nor trains: all 1, and none of ours. Matrix-Game
3's transformer also has inputs for the camera and its memory, which are left out.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging

from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models.actions.module import PARAMS

_NORM = re.compile(rf"^blocks\.\d+\.{PARAMS}\.(?:img|key)_attn_[qk]_norm\.weight$")
_CAMERA = re.compile(
    r"^(?:patch_embedding_wancamctrl|c2ws_hidden_states_layer[12]"
    r"|blocks\.\d+\.cam_(?:injector_layer[12]|scale_layer|shift_layer))\."
)


def collect[T](tensors: Mapping[str, T], file: str, *, ones: bool = True) -> dict[str, T]:
    """A transformer's tensors without what our action module has no arrays for.

    Args:
      tensors: by the original's keys; each has `read`.
      ones: refuse norms that are not 1; False: leave them out, as the original's forward does.

    Raises:
      InputError: a norm's weight is not 1.
    """
    camera = [key for key in tensors if _CAMERA.match(key)]
    if camera:
        logging.warning(
            "%s: %d tensors of camera and memory inputs are left out (%s, ...): the transformer "
            "was trained with them, and is another without", file, len(camera), camera[0],
        )  # fmt: skip
    norms = [key for key in tensors if _NORM.match(key)]
    for key in norms:
        wrong = ~(np.asarray(_read(tensors[key]), np.float32) == 1)
        if wrong.any() and ones:
            raise InputError(
                f"{file}: {key} must be 1 everywhere, as the original's module does not multiply "
                f"by it; {int(wrong.sum())} of its {wrong.size} numbers are not"
            )
        if wrong.any():
            logging.warning(
                "%s: %s is not 1; it is not multiplied by, as in the original", file, key
            )
    left = {*camera, *norms}
    return {key: tensor for key, tensor in tensors.items() if key not in left}


def _read(tensor: Any) -> np.ndarray:
    return tensor.read(0, None)


def sizes(shapes: Mapping[str, tuple[int, ...]], dim: int) -> dict[str, Any]:
    """Settings of `config.Actions` by the shapes of a file's tensors; empty without the module.

    dim: of the transformer. Heads are taken to be 64 wide, as all published ones are.
    """
    blocks = {key.split(".")[1] for key in shapes if f".{PARAMS}." in key}
    if not blocks:
        return {}
    prefix = f"blocks.{min(blocks, key=int)}.{PARAMS}"
    embed, keys = shapes.get(f"{prefix}.keyboard_embed.0.weight", (0, 0))
    width = shapes.get(f"{prefix}.mouse_attn_q.weight", (0, 0))[0]
    _, joined = shapes.get(f"{prefix}.mouse_mlp.0.weight", (0, dim))
    return {
        "kind": "module", "keyboard_dim": keys, "mouse_dim": (joined - dim) // 12,
        "keyboard_embed": embed, "heads": width // 64, "layers": len(blocks),
    }  # fmt: skip


def norms(spec: params_lib.Tree, head_dim: int = 64) -> dict[str, np.ndarray]:
    """The original's norms, all 1, of the blocks that have an action module by this spec."""
    tree = spec.get("blocks", {}).get(PARAMS)
    if tree is None:
        return {}
    layers = tree["proj_keyboard"]["weight"].shape[0]
    paths: Iterable[str] = ("img", "key") if "t_qkv" in tree else ("key",)
    return {
        f"blocks.{i}.{PARAMS}.{path}_attn_{name}_norm.weight": np.ones(head_dim, np.float32)
        for i in range(layers) for path in paths for name in "qk"
    }  # fmt: skip
