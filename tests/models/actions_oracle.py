"""The action module in float64 and plain loops, position by position."""

import numpy as np


def oracle(p, cfg, chunk, positions, x, keyboard, mouse=None):
    """Block-causal outputs [batch, latent * position, dim]; arguments as the module's own."""
    x, keyboard = np.asarray(x, np.float64), np.asarray(keyboard, np.float64)
    latents = x.shape[1] // positions
    window = cfg.window or latents
    visible = np.zeros((latents, latents), bool)
    for i in range(latents):
        end = (i // chunk + 1) * chunk
        visible[i, max(0, end - window) : end] = True
    out = np.stack(
        [
            _sample(
                p,
                cfg,
                visible,
                positions,
                x[b],
                keyboard[b],
                None if mouse is None else np.asarray(mouse[b], np.float64),
            )
            for b in range(len(x))
        ]
    )
    return out


def _sample(p, cfg, visible, positions, x, keyboard, mouse):
    latents = len(visible)
    x = x.reshape(latents, positions, -1)
    if mouse is not None:
        new = x.copy()
        moves = _windows(mouse, cfg.pad, latents).reshape(latents, -1)
        for at in range(positions):
            h = np.concatenate([x[:, at], moves], axis=-1)
            h = _linear(p["mouse_mlp"]["2"], _gelu(_linear(p["mouse_mlp"]["0"], h)))
            h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
            norm = p["mouse_mlp"]["3"]
            h = h * np.asarray(norm["weight"], np.float64) + np.asarray(norm["bias"], np.float64)
            q, k, v = np.split(_linear(p["t_qkv"], h), 3, axis=-1)
            new[:, at] += _linear(p["proj_mouse"], _attend(cfg, q, k, v, visible))
        x = new
    keys = _linear(p["keyboard_embed"]["0"], keyboard)
    keys = _linear(p["keyboard_embed"]["2"], keys / (1 + np.exp(-keys)))
    keys = _windows(keys, cfg.pad, latents).reshape(latents, -1)
    k, v = np.split(_linear(p["keyboard_attn_kv"], keys), 2, axis=-1)
    new = x.copy()
    for at in range(positions):
        q = _linear(p["mouse_attn_q"], x[:, at])
        new[:, at] += _linear(p["proj_keyboard"], _attend(cfg, q, k, v, visible))
    return new.reshape(latents * positions, -1)


def _windows(vectors, pad, latents):
    index = 4 * np.arange(latents)[:, None] - pad + np.arange(12)[None]
    return vectors[np.maximum(index, 0)]


def _linear(p, x):
    y = x @ np.asarray(p["weight"], np.float64)
    return y + np.asarray(p["bias"], np.float64) if "bias" in p else y


def _gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attend(cfg, q, k, v, visible):
    """Each latent's query over the visible latents, head by head: [latent, width]."""
    d, out = cfg.head_dim, np.zeros_like(q)
    for head in range(cfg.heads):
        own = slice(head * d, (head + 1) * d)
        a, b = _turned(q[:, own]), _turned(k[:, own])
        logits = np.where(visible, a @ b.T / np.sqrt(d), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, own] = weights / weights.sum(-1, keepdims=True) @ v[:, own]
    return out


def _turned(x):
    """Normalised, then the first four pairs turned by the latent's position."""
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    pairs = x[:, :8:2] + 1j * x[:, 1:8:2]
    pairs = pairs * np.exp(1j * np.arange(len(x))[:, None] * 256.0 ** (-np.arange(4) / 4))
    x = x.copy()
    x[:, :8:2], x[:, 1:8:2] = pairs.real, pairs.imag
    return x
