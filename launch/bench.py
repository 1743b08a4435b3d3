"""Measures one part of the system on random weights, warm-up excluded.

    python -m launch.bench NAME --config=configs/sample_5b.py [--chunks=20]

NAME is one of BENCHMARKS. Prints a readable report, then one JSON line of all figures.
"""

import importlib
import json
import sys

from absl import flags

from launch import command
from longlive_jax.errors import InputError

BENCHMARKS = (
    "stream", "vae", "convolution", "attention", "train", "distill", "balance", "kernels",
    "quality", "rows",
)  # fmt: skip

flags.DEFINE_integer("chunks", 20, "Chunks, or training steps, to measure.", lower_bound=2)
flags.DEFINE_string("checkpoint", None, "quality, vae: trained weights instead of random ones.")
flags.DEFINE_string("plot", None, "quality: a .png of the errors by layer and by chunk.")
flags.DEFINE_string("profile", None, "Folder for a jax.profiler trace of the measured calls.")


def main(name: str) -> None:
    if name not in BENCHMARKS:
        raise InputError(f"bench: no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    config = command.config()
    figures = importlib.import_module(f"launch.benchmarks.{name}").run(config)
    sys.stderr.flush()
    print(json.dumps({"benchmark": name} | figures), flush=True)


if __name__ == "__main__":
    command.run(main, arguments=1)
