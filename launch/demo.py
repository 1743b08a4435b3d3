"""The whole way on a laptop in two minutes: weights in the original's formats, converted, streamed.

    python -m launch.demo --output=out/demo

The weights are random and tiny, so the pictures are noise-like; what is shown is that every step
runs on real files: safetensors weights, prompts, a photograph, an mp4.
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
SHOTS = [
    {"prompt": "A cat sits by a window and looks out at the rain.", "chunks": 2},
    {"prompt": "The cat jumps down and walks through a bright kitchen.", "chunks": 2},
    {"prompt": "The cat stops and looks up.", "chunks": 1, "cut": False},
    {"prompt": "A wide street at night, lights in the wet asphalt.", "chunks": 2},
]


def main() -> None:
    out = pathlib.Path(FLAGS.output)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={out}: {error.strerror}; give a folder to write to") from error
    # Programs that several of the commands below compile are compiled once.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "cache").resolve()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    start = time.monotonic()
    weights = _random_weights(out / "weights")
    (out / "shots.json").write_text(json.dumps(SHOTS, indent=2))
    checkpoint = f"--checkpoint={out / 'checkpoint'}"
    _run("launch.convert", *weights, f"--output={out / 'checkpoint'}")
    _run(
        "launch.sample", checkpoint, f"--prompts={out / 'shots.json'}",
        f"--image={ASSETS / 'photo.jpg'}", f"--output={out / 'shots.mp4'}",
        f"--contact_sheet={out / 'shots.png'}",
    )  # fmt: skip
    _run(
        "launch.sample", checkpoint, f"--prompts={out / 'shots.json'}",
        f"--continue_from={ASSETS / 'clip.mp4'}", f"--output={out / 'continued.mp4'}",
        f"--contact_sheet={out / 'continued.png'}",
    )  # fmt: skip
    print(f"demo: {time.monotonic() - start:.0f} s. Look at:")
    for name in ("shots.mp4", "shots.png", "continued.mp4", "continued.png"):
        print(f"  {out / name}")


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


def _run(module: str, *arguments: str) -> None:
    words = [sys.executable, "-m", module, "--config=configs/tiny.py", *arguments]
    print("$ python", *words[1:], flush=True)
    if code := subprocess.run(words).returncode:
        sys.exit(code)


if __name__ == "__main__":
    command.run(main)
