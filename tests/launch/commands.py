"""Runs the project's commands as processes, without each of them importing JAX anew.

A fork server imports what the commands share, once; each run is a fork of it, which is a process
like any other: its own flags, its own devices, its own exit code.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import safetensors, store
from longlive_jax.models import dit, tokenizer, umt5, vae
from tests.golden_files import FOLDER, MODEL, arrays

ROOT = pathlib.Path(__file__).parents[2]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.launch.preload"])

PROMPTS = ["a red boat on a lake", "a cat walks in the snow"]


@dataclasses.dataclass
class Done:
    code: int
    stdout: str
    stderr: str


def run(command: str, *args, devices: int = 1, patch=None, check: bool = True) -> Done:
    """`python -m launch.COMMAND ARGS`. `patch()` is called in the new process before it."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"launch.{command}", *map(str, args)]
        process = _SERVER.Process(target=_child, args=(words, folder, devices, patch))
        process.start()
        process.join(300)
        out, err = (pathlib.Path(folder, name).read_text() for name in ("out", "err"))
        done = Done(process.exitcode, out, err)
    if check:
        assert done.code == 0, done.stderr
    return done


def _child(words, folder, devices, patch):
    enter(words, [f"{folder}/out", f"{folder}/err"], devices, patch)


def enter(words, outputs, devices, patch):
    """Becomes `python -m WORDS`, with stdout and stderr in these files, which grow."""
    for number, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if patch:
        patch()
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


# The golden models as a checkpoint, through launch.convert.

_VAE = arrays("vae_tiny")
_UMT5 = dict(vocab_size=100, dim=64, dim_attn=64, dim_ffn=96, num_heads=8, num_layers=3)
GOLDEN = [
    "--config=configs/tiny.py",
    *(f"--config.model.{k}={getattr(MODEL, k)}" for k in ("dim", "ffn_dim", "num_heads")),
    *(f"--config.model.{k}={getattr(MODEL, k)}" for k in ("text_dim", "text_len")),
    *(f"--config.umt5.{k}={v}" for k, v in _UMT5.items()),
    *(
        f"--config.vae.{k}={','.join(map(str, _VAE[k].tolist()))}"
        for k in ("latent_mean", "latent_std")
    ),
]


def convert_golden(folder: pathlib.Path) -> pathlib.Path:
    flags = []
    for part, prefix in (("dit", "model."), ("vae", ""), ("umt5", "")):
        file = arrays(f"{part}_tiny")
        weights = {prefix + k[8:]: v for k, v in file.items() if k.startswith("weights/")}
        shapes = {k: (v.shape, v.dtype) for k, v in weights.items()}
        safetensors.write(folder / f"{part}.safetensors", shapes, weights.items())
        flags.append(f"--{part}={folder / part}.safetensors")
    run("convert", *GOLDEN, *flags, f"--output={folder / 'golden'}")
    return folder / "golden"


# A checkpoint of configs/tiny.py with a tokenizer, and small inputs of every kind.

TINY = ["--config=configs/tiny.py", "--config.sample.chunks=2", "--config.sample.steps=2",
        "--config.video.height=32", "--config.video.width=64",
        "--config.sample.vae_latents_per_call=1"]  # fmt: skip


# The same with keys and a mouse.
ACTIONS = {"actions.kind": "module", "actions.heads": 4, "actions.head_dim": 8,
           "actions.keyboard_embed": 8, "actions.layers": 1, "actions.window": 8}  # fmt: skip


def tiny_config(overrides=()) -> config_lib.Config:
    from configs import tiny

    cfg = config_lib.from_config_dict(tiny.get_config())
    return config_lib.with_overrides(cfg, dict(overrides))


def save_tiny(
    directory: pathlib.Path, parts=("dit", "vae", "umt5"), trees=("",), overrides=()
) -> pathlib.Path:
    """Random weights, large enough that pictures are not grey; `trees`: top-level names' starts."""
    cfg, draw = tiny_config(overrides), np.random.default_rng(0)

    def weight(spec):
        ones = spec.init is params_lib.ones
        return np.ones(spec.shape) if ones else 0.1 * draw.standard_normal(spec.shape)

    for part, model, section in (
        ("dit", dit, cfg.model), ("vae", vae, cfg.vae), ("umt5", umt5, cfg.umt5),
    ):  # fmt: skip
        if part in parts:
            spec = {k: v for k, v in model.spec(section).items() if k.startswith(tuple(trees))}
            tree = jax.tree.map(
                lambda s: weight(s).astype(np.float32), spec, is_leaf=params_lib.is_spec
            )
            pieces = store.tree_pieces(tree, spec)
            store.save(directory, part, pieces, spec, section=section, sources=[f"{part}.pt"])
    if "umt5" in parts:
        file = directory.parent / "tokenizer.json"
        tokenizer.train_tiny(PROMPTS, cfg.umt5.vocab_size, file)
        store.save_tokenizer(directory, file)
    return directory


def write(path: pathlib.Path, value) -> pathlib.Path:
    """Text as it is, a dict as .npz, anything else as JSON."""
    if isinstance(value, str):
        path.write_text(value)
    elif isinstance(value, dict):
        np.savez(path, **value)
    else:
        path.write_text(json.dumps(value))
    return path


def golden(name: str) -> dict[str, np.ndarray]:
    assert (FOLDER / f"{name}.npz").is_file()
    return arrays(name)
