"""What every command shares: flags, the config file, and how bad input is reported."""

import errno
import os
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError

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


def numbered(path: str, index: int, total: int) -> str:
    """`path` of one output, of output `index` of several: out.mp4 -> out-003.mp4."""
    if total == 1:
        return path
    stem, suffix = os.path.splitext(path)
    return f"{stem}-{index:03d}{suffix}"


def _parse(argv: list[str], arguments: int) -> list[str]:
    # Overrides need the file they override, wherever it stands on the line.
    argv = argv[:1] + sorted(argv[1:], key=lambda word: not word.lstrip("-").startswith("config="))
    try:
        rest = FLAGS(argv)[1:]
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        SyntaxError,
        OSError,
    ) as error:
        # ml_collections raises plain Python errors for unknown keys and values of the wrong type.
        raise InputError(f"command line: {str(error).strip(chr(34))}") from error
    if len(rest) > arguments:
        raise InputError(f"command line: {rest[arguments]!r} is not a flag; flags are --name=value")
    if len(rest) < arguments:
        raise InputError(f"command line: {arguments} word(s) wanted before the flags; see --help")
    return rest


def _stop(code: int, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    # Threads of decoders and compilers must not keep a failed command alive.
    sys.stdout.flush()
    os._exit(code)
