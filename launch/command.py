"""What every command shares: flags, the config file, and how bad input is reported."""

import dataclasses
import errno
import os
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from longlive_jax import config as config_lib
from longlive_jax.config import section
from longlive_jax.errors import InputError
from longlive_jax.files.atomic import partial_file

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File in configs/; override a value with --config.section.key=VALUE."
)


def config() -> config_lib.Config:
    """The validated config of `--config` and its overrides."""
    try:
        values = _CONFIG.value  # reads the file
    except (OSError, ImportError, AttributeError, SyntaxError) as error:
        raise InputError(f"--config: {error}") from error
    if values is None:
        raise InputError("--config is missing; for example --config=configs/tiny.py")
    return config_lib.from_config_dict(values)


def run(main: Callable[..., None], arguments: int = 0) -> None:
    """Parses the command line and calls `main` with its `arguments` words that are not flags.

    Exit codes: 0 done, 2 bad input (message on stderr, no traceback), 130 interrupted.
    """
    try:
        main(*_parse(sys.argv, arguments))
    except InputError as error:
        _stop(2, f"error: {error}")
    except KeyboardInterrupt:
        _stop(130, "interrupted")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _stop(
            2,
            f"error: no space left on the disk of {error.filename or 'the output'}; free some "
            "or give another --output",
        )


def check_output(name: str, *suffixes: str) -> None:
    """Refuses an output that is missing, of another kind, or cannot be written, before any work.

    Raises:
      InputError: also for a path that is a folder.
    """
    path = FLAGS[name].value
    if not path:
        raise InputError(f"--{name} is missing; give the {' or '.join(suffixes)} file to write")
    if not path.endswith(suffixes):
        raise InputError(f"--{name}={path}: must end with {' or '.join(suffixes)}")
    partial_file(path).unlink()


def numbered(path: str, index: int, total: int) -> str:
    """`path` of one output, of output `index` of several: out.mp4 -> out-003.mp4."""
    if total == 1:
        return path
    stem, suffix = os.path.splitext(path)
    return f"{stem}-{index:03d}{suffix}"


def _parse(argv: list[str], arguments: int) -> list[str]:
    words = [_renamed(word) for word in argv[1:]]
    if "--config" in words[:-1]:  # --config FILE
        i = words.index("--config")
        words[i : i + 2] = [f"--config={words[i + 1]}"]
    # Overrides need the file they override, wherever it stands on the line.
    words.sort(key=lambda word: not word.lstrip("-").startswith("config="))
    names = [word.lstrip("-").partition("=")[0] for word in words]
    overrides = [name for name in names if name.startswith("config.")]
    file = words[0].partition("=")[2] if words and names[0] == "config" else ""
    if overrides and not file:
        raise InputError(f"--{overrides[0]}: --config is missing; give the file it overrides")
    if file and not os.path.isfile(file.partition(":")[0]):
        raise InputError(f"--config={file}: no such file; there are examples in configs/")
    sys.argv = [argv[0], *words]  # where ml_collections looks for overrides
    try:
        rest = FLAGS(sys.argv)[1:]
    except (AttributeError, KeyError) as error:
        key = error.args[0] if isinstance(error, KeyError) else str(error)
        raise InputError(f"command line: unknown config key: {_unknown(overrides, key)}") from error
    except (flags.Error, TypeError, ValueError, SyntaxError, OSError) as error:
        # ml_collections raises plain Python errors for values of the wrong type.
        raise InputError(f"command line: {str(error).strip(chr(34))}") from error
    if len(rest) > arguments:
        raise InputError(f"command line: {rest[arguments]!r} is not a flag; flags are --name=value")
    if len(rest) < arguments:
        raise InputError(f"command line: {arguments} word(s) wanted before the flags; see --help")
    return rest


def _renamed(word: str) -> str:
    """A word of the command line, with the present name of the setting that it overrides."""
    flag, *value = word.split("=", 1)
    dashes, _, name = flag.partition("config.")
    new = config_lib.renamed(name)
    if new == name or dashes not in ("-", "--"):
        return word
    print(f"note: {flag} is now --config.{new}", file=sys.stderr, flush=True)
    return "=".join([f"--config.{new}", *value])


def _unknown(overrides: list[str], otherwise: str) -> str:
    """The first override that names no field of Config, and the fields there are in its place."""
    for override in overrides:
        kind = config_lib.Config
        for name in override.split(".")[1:]:
            fields = section.hints(kind) if dataclasses.is_dataclass(kind) else {}
            if name not in fields:
                there = f"; known keys: {', '.join(fields)}" if fields else ""
                return f"{override}{there}"
            kind = fields[name]
    # An old config file, whose settings have moved: its error names the key alone.
    moved = (new for old, new in config_lib.MOVED.items() if f'"{old.split(".")[1]}"' in otherwise)
    return otherwise + "".join(f"; it is now config.{new}" for new in moved)


def _stop(code: int, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    # Threads of decoders and compilers must not keep a failed command alive.
    sys.stdout.flush()
    os._exit(code)
