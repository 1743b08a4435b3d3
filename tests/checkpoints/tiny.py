"""The golden networks: their configs, and their weights under the original's keys."""

import functools
import json
import pathlib

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.checkpoints import safetensors
from longlive_jax.models import dit, umt5, vae

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SPECS = {"dit": dit.spec, "vae": vae.spec, "umt5": umt5.spec}
SECTIONS = {"dit": "model", "vae": "vae", "umt5": "umt5"}
_ZEROS, _ONES = (0.0,) * 4, (1.0,) * 4


@functools.cache
def config() -> config_lib.Config:
    golden = {p: json.loads(str(np.load(GOLDEN / f"{p}_tiny.npz")["config"])) for p in SPECS}
    d, v, u = golden["dit"]["config"], golden["vae"], golden["umt5"]
    return config_lib.Config(
        model=config_lib.Model(
            **{k: d[k] for k in ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim")},
            **{k: d[k] for k in ("text_dim", "text_len", "freq_dim")},
        ),
        vae=config_lib.VAE(
            v["dim"], v["dec_dim"], v["z_dim"], latent_mean=_ZEROS, latent_std=_ONES
        ),
        umt5=config_lib.UMT5(**{k: v for k, v in u.items() if k != "shared_pos"}),
    )


def section(part):
    return getattr(config(), SECTIONS[part])


def spec(part):
    return SPECS[part](section(part))


@functools.cache
def weights(part):
    """The original's tensors by key; do not change them."""
    with np.load(GOLDEN / f"{part}_tiny.npz") as data:
        return {k[8:]: data[k] for k in data.files if k.startswith("weights/")}


def flags(part="dit"):
    """The overrides that turn configs/tiny.py into `config()`."""
    tiny = section(part)
    return [
        f"--config.{SECTIONS[part]}.{k}={value}"
        for k, value in config_lib.values(tiny).items()
        if not k.startswith("latent") and k != "chunk_frames"
    ]


def write_safetensors(file, tensors):
    safetensors.write(file, {k: (v.shape, v.dtype) for k, v in tensors.items()}, tensors.items())
    return str(file)


def ours(part):
    """The golden weights in our layout, by the rules of the design and not by the code's."""
    w = weights(part)
    result = {}
    layers = 1 + max((int(k.split(".")[1]) for k in w if k.startswith("blocks.")), default=-1)
    for key, t in w.items():
        path = key.split(".")
        if path[0] == "blocks":
            if path[1] != "0":
                continue
            path.pop(1)
            t = np.stack([_one(path, w[key.replace(".0.", f".{i}.", 1)]) for i in range(layers)])
        else:
            t = _one(path, t)
        result["/".join(path)] = t
    for name, parts in (("self_attn/qkv", "qkv"), ("cross_attn/kv", "kv")):
        for leaf in ("weight", "bias"):
            keys = [f"blocks/{name.split('/')[0]}/{p}/{leaf}" for p in parts]
            if part == "dit":
                result[f"blocks/{name}/{leaf}"] = np.concatenate([result.pop(k) for k in keys], -1)
    return result


def _one(path, t):
    if path[-1] == "modulation":
        return t[0]
    if path == ["patch_embedding", "weight"]:
        return np.einsum("oczhw->czhwo", t).reshape(-1, t.shape[0])
    if t.ndim == 5:
        return np.einsum("oithw->thwio", t)
    if path[-1] == "gamma":
        return t.ravel()
    if t.ndim == 4 and path[-1] == "gamma":
        return t.ravel()
    if t.ndim == 4:
        return np.einsum("oihw->hwio", t)
    if t.ndim == 2 and path[-2] not in ("token_embedding", "embedding"):
        return t.T
    return t
