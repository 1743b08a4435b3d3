"""Floating-point operations of the action path, by formula."""

from longlive_jax import config as config_lib


def flops(cfg: config_lib.Model, tokens: int) -> int:
    """Of the products with one forward's `tokens`; a multiply and an add count as two.

    Those with one row a latent, and attention over a few latents, are a thousandth of it.
    """
    own, d = cfg.actions, cfg.dim
    if own.kind != "module":
        return 0
    keyboard, mouse = 2 * d * own.width, 2 * d * own.width + 4 * own.width**2
    return 2 * tokens * own.layers * (keyboard + (mouse if own.mouse_dim else 0))
