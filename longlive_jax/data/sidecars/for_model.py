"""Actions as a model reads them: one vector a picture for each of its paths.

A model's array of actions has its own alignment, `actions.pad`: its entry p + 11 - pad drives
picture p, of a video whose first latent is one picture. In a sidecar row p - 1 does so with pad 12,
row p with 11 or 8. `vectors` moves the rows, so that any sidecar drives its own pictures.
"""

import dataclasses

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.config.actions import PADS
from longlive_jax.data.sidecars import keys as keys_lib
from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.errors import InputError

KEYBOARD, MOUSE = "keyboard", "mouse"  # as `models.actions` names the paths
_MOUSE_DIM = 2  # pitch, yaw


def model_keys(cfg: config_lib.Actions) -> tuple[str, ...]:
    """The names of the keys of a model with an action path, in the order of its vectors.

    Raises:
      InputError: nothing names them, or one of them is unknown.
    """
    if not cfg.key_names:
        raise InputError(
            f"config: actions.keyboard_dim={cfg.keyboard_dim} and no names for its keys; give "
            "actions.keys, such as 'KeyW,KeyS,KeyA,KeyD,Space'"
        )
    return keys_lib.check(cfg.key_names, "config: actions.keys")


def check_model(actions: Actions, cfg: config_lib.Actions) -> None:
    """Refuses actions that a model cannot be given.

    Raises:
      InputError: a model without an action path; keys or a mouse that it does not have, and that
        are used; as `model_keys`.
    """
    where = actions.where
    if cfg.kind == "none":
        raise InputError(
            f"{where}: actions for a model without an action path (actions.kind='none'); leave "
            "them out, or take a config and a checkpoint that has one"
        )
    names = model_keys(cfg)
    used = actions.keyboard.any(axis=0)
    for name, is_used in zip(actions.keys, used):
        if is_used and name not in names:
            picture = int(np.flatnonzero(actions.keyboard[:, actions.keys.index(name)])[0])
            raise InputError(
                f"{where}: key {name!r} is held in picture {picture}, and the model has none; its "
                f"keys are {', '.join(names)}"
            )
    if cfg.mouse_dim not in (0, _MOUSE_DIM):
        raise InputError(
            f"config: actions.mouse_dim={cfg.mouse_dim}; a sidecar's mouse is pitch and yaw, so "
            f"it must be {_MOUSE_DIM}, or 0 without a mouse"
        )
    if not cfg.mouse_dim and actions.mouse.any():
        picture = int(np.flatnonzero(actions.mouse.any(axis=1))[0])
        raise InputError(
            f"{where}: the mouse moves in picture {picture}, and the model has no mouse "
            "(actions.mouse_dim=0); leave the moves out"
        )


def aligned(actions: Actions, cfg: config_lib.Actions) -> Actions:
    """The same, in the model's keys and alignment: its record, when they are applied to it.

    What is before the first row, or after the last, is a copy of it.

    Raises:
      InputError: as `check_model`.
    """
    check_model(actions, cfg)
    names = model_keys(cfg)
    index = np.arange(len(actions)) + lag(cfg.pad) - lag(actions.pad)
    index = np.clip(index, 0, len(actions) - 1)
    keyboard = np.zeros((len(actions), len(names)), np.float32)
    for column, name in enumerate(names):
        if name in actions.keys:
            keyboard[:, column] = actions.keyboard[index, actions.keys.index(name)]
    return dataclasses.replace(
        actions, keyboard=keyboard, mouse=actions.mouse[index], keys=names, pad=cfg.pad
    )


def vectors(actions: Actions, cfg: config_lib.Actions) -> dict[str, np.ndarray]:
    """By path, float32 [action, dim] in the order of a model's array of actions.

    That is what `models.actions.windows` and `of_chunk` take, with a batch axis before. With
    `actions.pad` 8 it has three entries more than pictures, in front: a video that begins with one
    picture has one latent more than its pictures by fours.

    Raises:
      InputError: as `check_model`.
    """
    made = aligned(actions, cfg)
    index = np.maximum(np.arange(-max(0, 11 - cfg.pad), len(made)), 0)
    return {name: x[index] for name, x in of_rows(made, cfg).items()}


def of_rows(actions: Actions, cfg: config_lib.Actions) -> dict[str, np.ndarray]:
    """By path, float32 [picture, dim], of rows that `aligned` made."""
    made = {KEYBOARD: actions.keyboard}
    if cfg.mouse_dim:
        made[MOUSE] = actions.mouse / np.float32(cfg.mouse_degrees)
    return made


def lag(pad: int) -> int:
    """By how many pictures a row comes before the picture that it drives."""
    return int(pad == PADS[0])
