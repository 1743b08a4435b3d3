"""Prompts in, a video of several shots out, on a laptop in two minutes.

    python -m launch.demo --output=out/demo

A transformer of 7 million weights, trained on a small world of moving shapes (assets/tiny_world),
samples three shots; then a fourth continues their mp4. `checkpoint` in the folder is converted from
other, random weights in the original's formats, to show that these are read; `configs/tiny.py` is
its config.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
from absl import flags

from configs import tiny
from launch import command
from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import to_torch
from longlive_jax.errors import InputError
from longlive_jax.models import dit, tokenizer, umt5, vae

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "out/demo", "Folder for all that the demo makes.")

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
WORLD = "configs/train_ar_tiny_world.py"
SHOTS = [
    {
        "prompt": "A yellow star moves to the right and a blue square moves left over a black "
        "background.",
        "chunks": 2,
    },
    {"prompt": "A pink moon gets bigger over a dark blue background.", "chunks": 2},
    {"prompt": "Over a white background, a red triangle bounces up and down.", "chunks": 1},
]
NEXT = [
    {
        "prompt": "There is a background of white and grey stripes. A purple cross falls.",
        "chunks": 1,
    }
]


def main() -> None:
    out = pathlib.Path(FLAGS.output)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={out}: {error.strerror}; give a folder to write to") from error
    # The commands below share a cache, so that each program is compiled once.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "cache").resolve()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    start = time.monotonic()
    _sample(out, "shots", SHOTS)
    _sample(out, "continued", NEXT, f"--continue_from={out / 'shots.mp4'}")
    weights = _random_weights(out / "weights")
    _run("launch.convert", "configs/tiny.py", *weights, f"--output={out / 'checkpoint'}")
    print(f"demo: {time.monotonic() - start:.0f} s. Look at:")
    for name in ("shots.mp4", "shots.png", "continued.mp4", "continued.png"):
        print(f"  {out / name}")


def _sample(out: pathlib.Path, name: str, shots: list[dict], *more: str) -> None:
    (out / f"{name}.json").write_text(json.dumps(shots, indent=2))
    _run(
        "launch.sample", WORLD, f"--checkpoint={ASSETS / 'tiny_world' / 'checkpoint'}",
        f"--prompts={out / name}.json", f"--output={out / name}.mp4",
        f"--contact_sheet={out / name}.png", "--config.sample.steps=10", *more,
    )  # fmt: skip


def _random_weights(folder: pathlib.Path) -> list[str]:
    """Writes tiny random weights as safetensors with the original's names; flags for convert."""
    folder.mkdir(exist_ok=True)
    cfg = config_lib.from_config_dict(tiny.get_config())
    texts = [shot["prompt"] for shot in SHOTS]
    tokenizer.train_tiny(texts, cfg.umt5.vocab_size, folder / tokenizer.FILE)
    result = [f"--tokenizer={folder / tokenizer.FILE}"]
    draw = np.random.default_rng(0)

    def weight(spec: params_lib.ParamSpec) -> np.ndarray:
        if spec.init is params_lib.ones:
            return np.ones(spec.shape, np.float32)
        return (0.1 * draw.standard_normal(spec.shape)).astype(np.float32)

    specs = {"dit": dit.spec(cfg.model), "vae": vae.spec(cfg.vae), "umt5": umt5.spec(cfg.umt5)}
    for part, spec in specs.items():
        file = folder / f"{part}.safetensors"
        tree = jax.tree.map(weight, spec, is_leaf=params_lib.is_spec)
        to_torch.export_tree(tree, spec, file)
        result.append(f"--{part}={file}")
    return result


def _run(module: str, config: str, *arguments: str) -> None:
    words = [sys.executable, "-m", module, f"--config={config}", *arguments]
    print("$ python", *words[1:], flush=True)
    if code := subprocess.run(words).returncode:
        sys.exit(code)


if __name__ == "__main__":
    command.run(main)
