"""Actions that nobody recorded: a walker who holds keys and turns, each for a random while."""

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.data import sidecars

_SPELL = (6, 48)  # pictures that one choice lasts, a quarter of a second to two
_HOLDS, _HOLDS_TWO, _TURNS, _LOOKS = 0.8, 0.3, 0.5, 0.1  # probabilities of a choice
_DEGREES = 3.0  # a picture: the standard deviation of a turn
_OPPOSITE = {
    "KeyW": "KeyS", "KeyA": "KeyD", "ArrowUp": "ArrowDown", "ArrowLeft": "ArrowRight",
}  # fmt: skip


def walk(cfg: config_lib.Actions, pictures: int, rng: np.random.Generator) -> sidecars.Actions:
    """A random walk of `pictures` pictures, at the rate of samples, in the model's keys.

    Opposite keys are not held together; a model without a mouse gets none.

    Raises:
      InputError: nothing names the model's keys.
    """
    keys = sidecars.model_keys(cfg)
    opposite = _OPPOSITE | {b: a for a, b in _OPPOSITE.items()}
    keyboard, mouse = np.zeros((pictures, len(keys))), np.zeros((pictures, 2))
    start = 0
    while start < pictures:
        here = slice(start, start + int(rng.integers(_SPELL[0], _SPELL[1] + 1)))
        start = here.stop
        first, second = rng.integers(len(keys), size=2)
        holds, two, turns, looks = rng.random(4) < (_HOLDS, _HOLDS_TWO, _TURNS, _LOOKS)
        pitch, yaw = rng.normal(0, _DEGREES, 2)
        if holds:
            keyboard[here, first] = 1
        if holds and two and opposite.get(keys[first]) != keys[second]:
            keyboard[here, second] = 1
        if cfg.mouse_dim:
            mouse[here] = pitch * looks, yaw * turns
    mouse = np.clip(mouse, -sidecars.MAX_DEGREES, sidecars.MAX_DEGREES)
    return sidecars.Actions(
        keyboard=keyboard, mouse=mouse, fps=FRAMES_PER_SECOND, keys=keys, pad=cfg.pad,
        source="a random walk",
    )  # fmt: skip
