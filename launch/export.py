"""A training run to a checkpoint that stands alone: its weights, VAE, text encoder and tokenizer.

    python -m launch.export --config=configs/train_ar_tiny_world.py --checkpoint=WORKDIR \\
        --output=CKPT [--weights=average|latest]

Weights are written in the config's compute dtype, without optimiser: a training state is eight
times as large.
"""

import os
import time

from absl import flags

from launch import command
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import networks, store, workdir
from longlive_jax.checkpoints.parts import PARTS
from longlive_jax.errors import InputError
from longlive_jax.models import tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "The folder of a training run.")
flags.DEFINE_string("output", None, "The checkpoint to make.")
flags.DEFINE_enum(
    "weights", "average", list(workdir.WEIGHTS), "The weights' moving average, or the last step's."
)


def main() -> None:
    cfg = command.config()
    if not FLAGS.checkpoint or not workdir.is_run(FLAGS.checkpoint):
        raise InputError(
            f"--checkpoint={FLAGS.checkpoint}: is not the folder of a training run; give the "
            "--workdir of launch.train"
        )
    if not FLAGS.output:
        raise InputError("--output is missing; give the checkpoint's directory")
    command.check_apart([FLAGS.output], [], networks.folders(FLAGS.checkpoint))
    mesh = mesh_lib.make_mesh(config_lib.Mesh())
    found = [part for part in networks.parts(FLAGS.checkpoint) if part in PARTS]
    for part in found:
        networks.check(FLAGS.checkpoint, part, cfg)
    for part in found:
        start = time.monotonic()
        section, spec = networks.spec(part, cfg)
        tree = networks.load(FLAGS.checkpoint, part, cfg, mesh, weights=FLAGS.weights)
        summary = store.save_tree(FLAGS.output, part, tree, spec, section=section)
        seconds = time.monotonic() - start
        print(f"{part}: {summary.describe()}, {seconds:.1f} s", flush=True)
    if "umt5" in found:
        words = os.path.join(networks.directory(FLAGS.checkpoint), tokenizer.FILE)
        store.save_tokenizer(FLAGS.output, words)


if __name__ == "__main__":
    command.run(main, addresses=("checkpoint", "output"))
