"""Actions of training samples as one array: a row a picture, in the model's keys and alignment.

    float32 [picture, key + 2]   how far each key is held, then the mouse's pitch and yaw in degrees

A row drives its picture or the next one, by `actions.pad`, as `sidecars.aligned` has it. The rows
of a sample are cut, joined and padded as its pictures are, and stored as they are.
"""

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.data import sidecars
from longlive_jax.data.sidecars import for_model

MOUSE = 2  # numbers of a row's mouse


def of(
    actions: sidecars.Actions, cfg: config_lib.Actions, start: int = 0, pictures: int | None = None
) -> np.ndarray:
    """The rows of a video's actions at the rate of samples; at another rate they are resampled.

    Args:
      start: the video's picture that the first row is of.
      pictures: how many rows, the last one repeated where there are fewer; None: all.

    Raises:
      InputError: keys or a mouse that the model does not have.
    """
    own = sidecars.aligned(actions, cfg)
    own = own.cut(min(start, len(own) - 1), len(own))
    if abs(own.fps / FRAMES_PER_SECOND - 1) > 1e-3:
        own = sidecars.to_rate(own, FRAMES_PER_SECOND, pictures)
    rows = np.concatenate([own.keyboard, own.mouse], axis=1)
    return rows if pictures is None else fitted(rows, pictures)


def actions(
    rows: np.ndarray, keys: tuple[str, ...], pad: int, where: str = "actions"
) -> sidecars.Actions:
    """The inverse of `of`, for a model with these keys and this alignment."""
    return sidecars.Actions(
        keyboard=rows[:, :-MOUSE], mouse=rows[:, -MOUSE:], fps=FRAMES_PER_SECOND, keys=keys,
        pad=pad, where=where,
    )  # fmt: skip


def fitted(rows: np.ndarray, pictures: int) -> np.ndarray:
    """The first so many rows; the last one is repeated where there are fewer."""
    return rows[np.minimum(np.arange(pictures), len(rows) - 1)]


def vectors(rows: np.ndarray, cfg: config_lib.Actions) -> dict[str, np.ndarray]:
    """By path, float32 [1, action, dim], as `models.actions.windows` takes them."""
    # As `sidecars.vectors` begins a video whose first latent is one picture.
    rows = rows[np.maximum(np.arange(-max(0, 11 - cfg.pad), len(rows)), 0)]
    found = {for_model.KEYBOARD: rows[None, :, :-MOUSE]}
    if cfg.mouse_dim:
        found[for_model.MOUSE] = rows[None, :, -MOUSE:] / np.float32(cfg.mouse_degrees)
    return found
