"""What every command shares: flags, the config file, and how it ends when something is wrong."""

import dataclasses
import errno
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterable

from absl import flags
from ml_collections import config_flags

from longlive_jax import config as config_lib
from longlive_jax.config import section
from longlive_jax.errors import InputError, NotFiniteError, StorageError
from longlive_jax.files import remote, scratch
from longlive_jax.files.atomic import discard, partial_file, remove_abandoned

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parents[1]  # of the repository
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File in configs/; override a value with --config.section.key=VALUE."
)
# Flags of files that a command can download from a hub; and of what it may write.
_HUB = ("dit", "vae", "umt5", "tokenizer", "lora", "start")
_WRITTEN = ("workdir", "output", "save_latents", "contact_sheet")
# What a disk answers, whatever the command was writing, and what to do then.
_STORAGE = {
    errno.ENOSPC: "no space left on the disk of {}; free some or give another --output",
    errno.EDQUOT: "the disk quota is used up for {}; free some or give another --output",
    errno.EFBIG: "{} gets larger than its disk, or ulimit -f, allows; give another --output",
    errno.EROFS: "the disk of {} cannot be written, it is mounted read-only; give another --output",
    errno.EACCES: "no permission for {}; give another file, or change its mode or owner",
    errno.EPERM: "no permission for {}; give another file, or change its mode or owner",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever is kept on Ctrl-C is kept then, too."""


def config(default: config_lib.Config | None = None) -> config_lib.Config:
    """The validated config of `--config` and its overrides; without a file, the default."""
    try:
        values = _CONFIG.value  # reads the file
    except (OSError, ImportError, AttributeError, SyntaxError) as error:
        raise InputError(f"--config: {error}") from error
    if values is None and default is not None:
        return default
    if values is None:
        raise InputError("--config is missing; for example --config=configs/tiny.py")
    cfg = config_lib.from_config_dict(values)
    _check_paths(cfg)
    return cfg


def _check_paths(cfg: config_lib.Config) -> None:
    """Refuses addresses that the config has for local paths."""
    for name in ("path", "eval_path"):
        value, flag = getattr(cfg.data, name), f"--config.data.{name}"
        remote.check(value, flag)
        if not remote.is_remote(value):
            continue
        if name == "eval_path":
            raise InputError(f"{flag}={value}: is read from a local disk; copy it there")
        if not cfg.data.cached:
            raise InputError(
                f"{flag}={value}: videos and prompts are read from a local disk; copy them there, "
                "or encode videos with launch.encode_dataset, and give its folder with "
                "data.cached=True"
            )
        remote.reach(value, flag)


def run(main: Callable[..., None], arguments: int = 0, addresses: Iterable[str] = ()) -> None:
    """Parses the command line and calls `main` with its `arguments` words that are not flags.

    Args:
      addresses: the flags that may be addresses on object storage. They are tried before `main`
        runs; an address for another flag is refused, as is one that nothing serves.

    Exit codes: 0 done, 1 results that are not finite or storage that was lost on the way, 2 bad
    input or a disk that refuses, 130 interrupted, 143 terminated; each but 0 with a message on
    stderr and no traceback.
    """
    _keep_streams()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        words = _parse(sys.argv, arguments)
        _check_addresses(tuple(addresses))
        main(*words)
    except InputError as error:
        _stop(2, f"error: {error}")
    except NotFiniteError as error:
        _stop(1, f"error: {error}")
    except StorageError as error:
        _stop(1, f"error: {lost(error)}")
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        _stop(143 if terminated else 130, "terminated" if terminated else "interrupted")
    except Exception as error:
        if (reason := refused_by_disk(error)) is None:
            raise
        _stop(2, f"error: {reason}")


def lost(error: StorageError) -> str:
    """A line on storage that refused, or did not answer, while the command ran."""
    return f"{error.filename}: {error.strerror}; the same command goes on where it can"


def _check_addresses(allowed: tuple[str, ...]) -> None:
    for name in FLAGS:
        if name == "config" or name.startswith("config."):
            continue
        value, flag = FLAGS[name].value, f"--{name}"
        if not isinstance(value, str) or (name in _HUB and value.startswith("hf://")):
            continue
        remote.check(value, flag)
        if not remote.is_remote(value):
            continue
        if name not in allowed:
            raise InputError(f"{flag}={value}: this command has it on a local disk; copy it there")
        remote.reach(value, flag, write=name in _WRITTEN)


def refused_by_disk(error: Exception) -> str | None:
    """A line on what a disk refused, and the way out; None for an error about another thing.

    Orbax and ArrayRecord raise errors of their own: those are known by the system's words.
    """
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return _STORAGE[error.errno].format(error.filename or "the output")
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        if os.strerror(number) in text:
            path = re.search(r"(?<![\w.])/[^\s:'\"\]]+", text)
            return _STORAGE[number].format(path[0] if path else "the output")
    return None


def check_output(name: str, *suffixes: str) -> None:
    """Refuses an output that is missing, of another kind, or cannot be written, before any work.

    Removes what killed runs left beside it.

    Raises:
      InputError: also for a path that is a folder.
    """
    path = FLAGS[name].value
    if not path:
        raise InputError(f"--{name} is missing; give the {' or '.join(suffixes)} file to write")
    if not path.endswith(suffixes):
        raise InputError(f"--{name}={path}: must end with {' or '.join(suffixes)}")
    remove_abandoned(path)
    discard(partial_file(path), path)


def check_apart(
    outputs: Iterable[str | None],
    inputs: Iterable[str | os.PathLike | None],
    folders: Iterable[str | None] = (),
) -> None:
    """Refuses outputs that would replace an input, or lie in a folder that is read.

    Args:
      outputs: files or folders, not made yet or from an earlier run.
      inputs: files that are read; None: not given.
      folders: checkpoints and the like.

    Raises:
      InputError: names both.
    """
    read = {_identity(path): path for path in inputs if path}
    closed = {_identity(path): path for path in folders if path}
    for output in filter(None, outputs):
        if path := read.get(_identity(output)):
            raise InputError(f"{output}: is read as {path}; give another file to write")
        place = pathlib.Path(os.path.realpath(output))
        for above in (place, *place.parents):
            if folder := closed.get(_identity(above)):
                raise InputError(
                    f"{output}: is in {folder}, which is read; give an output outside of it"
                )


def _identity(path: str | os.PathLike) -> tuple[int, int] | str:
    """What a file is by all of its names; of one that is missing, its name."""
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:
        return os.path.realpath(path)


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
    new = config_lib.located(name)
    if new == name or dashes not in ("-", "--"):
        return word
    if new != config_lib.renamed(name):  # a short name, no old one
        return "=".join([f"--config.{new}", *value])
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


class _Stream:
    """stdout or stderr; when its reader goes away, what is printed is lost and nothing else."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def _lasting(self, call, *args):
        try:
            return call(*args)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            return call(*args)

    def write(self, text):
        return self._lasting(self._stream.write, text)

    def writelines(self, lines):
        self.write("".join(lines))

    def flush(self):
        self._lasting(self._stream.flush)


def _keep_streams() -> None:
    """Printing ends no run: not into a pipe that is closed, nor without any stdout or stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the next file that is opened would get what libraries print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        # Python has None where one was closed when it started.
        stream = getattr(sys, name) or os.fdopen(number, "w", closefd=False)
        setattr(sys, name, _Stream(stream))


def _terminate(number, frame):
    """Ends as on Ctrl-C; a second signal ends at once."""
    del frame
    signal.signal(number, signal.SIG_DFL)
    raise Terminated


def _stop(code: int, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    scratch.remove()
    # Threads of decoders and compilers must not keep a failed command alive.
    sys.stdout.flush()
    os._exit(code)
