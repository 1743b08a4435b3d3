"""Runs one part of a network on given arrays, for comparison with other implementations.

    python -m launch.probe dmd --config=... --student=CKPT --teacher=CKPT --critic=CKPT \\
        --inputs=I.npz --output=O.npz [--gradient=stop|through] [--lora=FILE] \\
        [--gradients=KEY,KEY] [--critic_gradients=KEY,KEY] [--config.sample.steps=4 ...]

Names, shapes and layouts of the arrays are the original's; launch/probes/ says which they are.
"""

import importlib

from absl import flags

from launch import command
from longlive_jax.errors import InputError

PROBES = ("dmd",)

FLAGS = flags.FLAGS
flags.DEFINE_string("inputs", None, "A .npz file of arrays.")
flags.DEFINE_string("output", None, "The .npz file to write.")
flags.DEFINE_string("student", None, "dmd: the student's checkpoint.")
flags.DEFINE_string("teacher", None, "dmd: the teacher's checkpoint.")
flags.DEFINE_string("critic", None, "dmd: the critic's checkpoint.")
flags.DEFINE_string("lora", None, "dmd: adapters of the student, by PEFT's names.")
flags.DEFINE_enum("gradient", "stop", ["stop", "through"], "dmd: as distill.gradient.")
flags.DEFINE_list("gradients", [], "dmd: the student's weights whose gradients are wanted.")
flags.DEFINE_list("critic_gradients", [], "dmd: the critic's weights.")


def main(name: str) -> None:
    if name not in PROBES:
        raise InputError(f"probe: no probe {name!r}; there are {', '.join(PROBES)}")
    command.check_output("output", ".npz")
    if not FLAGS.inputs:
        raise InputError("--inputs is missing; give the .npz file of arrays")
    command.check_apart([FLAGS.output], [FLAGS.inputs])
    importlib.import_module(f"launch.probes.{name}").run(command.config())


if __name__ == "__main__":
    command.run(main, arguments=1)
