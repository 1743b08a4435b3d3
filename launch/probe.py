"""A part of the model on given arrays, for comparison with other implementations.

    python -m launch.probe actions --weights=W.safetensors --inputs=I.npz --output=O.npz --mode=full

The first word names the probe, a file of `launch/probes/`, which has its own flags. The config is
`configs/probe.py` unless another is given.
"""

import importlib
import sys

from launch import command
from longlive_jax.errors import InputError

# What each probe is about; its flags and its description are in its file.
PROBES = {
    "actions": "the action module of one block",
    "dmd": "one step of distillation",
}
_CONFIG = "configs/probe.py"


def main(name: str) -> None:
    importlib.import_module(f"launch.probes.{name}").main()


def start() -> None:
    """Defines the flags of the probe that the command line names, and runs it."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in PROBES:
        importlib.import_module(f"launch.probes.{word}")
    elif not word.startswith("--help"):
        sys.argv[1:] = []  # flags of no probe
        command.run(_refuse)
    if not any(x.lstrip("-").partition("=")[0] == "config" for x in sys.argv[2:]):
        sys.argv.append(f"--config={command.ROOT / _CONFIG}")
    command.run(main, 1)


def _refuse() -> None:
    known = "; ".join(f"{name}: {about}" for name, about in PROBES.items())
    raise InputError(f"command line: the first word must name a probe ({known})")


if __name__ == "__main__":
    start()
