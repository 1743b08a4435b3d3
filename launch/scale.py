"""Writes docs/scale.md: what the 5B's training takes on 8 to 4,096 devices, before there is one.

    python -m launch.scale

is seconds of arithmetic over kept results of the compiler, docs/scale.json. With libtpu

    PYTHONPATH=.venv/tpu python -m launch.scale --compile=all

compiles those programs first, some minutes each, and keeps what it learns after each.
"""

import pathlib

from absl import flags

from launch import command, scale_page, scale_programs
from longlive_jax.errors import InputError
from longlive_jax.files.atomic import atomic_path

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "docs/scale.md", "The document.")
flags.DEFINE_string("kept", "docs/scale.json", "What the compiler said; renewed by --compile.")
flags.DEFINE_string("compile", "", "Programs to compile, NAME@SLICE,... or all; empty: none.")


def main() -> None:
    programs = scale_programs.chosen(FLAGS.compile)
    kept = scale_programs.read(FLAGS.kept) if pathlib.Path(FLAGS.kept).exists() else {}
    for program in programs:
        record = kept[program.key] = scale_programs.compile_one(program)
        scale_programs.write(FLAGS.kept, kept)
        print(f"{record.key}: {record.refused or 'fits'}, {record.seconds} s", flush=True)
    if scale_page.NEEDED not in kept:
        raise InputError(
            f"--kept={FLAGS.kept}: has no {scale_page.NEEDED}; give --compile={scale_page.NEEDED}"
        )
    with atomic_path(FLAGS.output) as partial:
        partial.write_text(scale_page.text(kept))
    print(f"written: {FLAGS.output}")


if __name__ == "__main__":
    command.run(main)
