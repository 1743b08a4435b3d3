"""A compilation cache made ahead of time, and the manifest of the machine that it is for.

JAX finds a program in its cache by the program, its own version, XLA's flags and the kind of
device. It checks neither the driver, nor cuDNN, nor whether a file is whole: the manifest does.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import sys

import jax

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.files.atomic import atomic_path, partial_file

FILE = "manifest.json"
MAKE = "make it with python -m launch.compile --config=CONFIG --cache=DIR"
_ROOT = pathlib.Path(__file__).parent.parent


def machine() -> dict[str, str]:
    """The properties of this machine that compiled programs depend on."""
    device = jax.devices()[0]
    driver = pathlib.Path("/proc/driver/nvidia/version")
    facts = {
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "platform": device.client.platform_version,
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else "",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    if device.platform == "cpu":
        facts["cpu"] = _cpu()
    names = ("jaxlib", "jax-cuda", "nvidia-")  # CUDA, cuDNN, NCCL and their plugins are packages
    for package in importlib.metadata.distributions():
        if (package.name or "").startswith(names):
            facts[package.name] = package.version
    return dict(sorted(facts.items()))


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def source() -> str:
    """A hash of the package's and the commands' source."""
    files = sorted(
        f for folder in ("longlive_jax", "launch") for f in (_ROOT / folder).rglob("*.py")
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def run_id(cfg: config_lib.Config, batch: int, vae_device: int | None) -> str:
    """A hash of all settings that a sampler's programs depend on."""
    texts = dict(negative_prompt="", scene_cut_prefix="", chunks=1)
    sample = dataclasses.replace(cfg.sample, **texts)
    sections = (cfg.model, cfg.vae, cfg.umt5, cfg.mesh, cfg.video, sample, cfg.quant)
    facts = (*sections, cfg.dtype, batch, vae_device)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@dataclasses.dataclass
class Manifest:
    """The content of a cache.

    runs: by `run_id`, {"source": hash, "programs": {name: {"seconds", "temp_bytes", ...}}}.
    entries: the cache's files, with the hash of each.
    """

    machine: dict[str, str]
    runs: dict[str, dict] = dataclasses.field(default_factory=dict)
    entries: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, directory: str) -> "Manifest | None":
        """The manifest of a cache; None if it has none.

        Raises:
          InputError: a file that is not a manifest.
        """
        path = pathlib.Path(directory, FILE)
        if not path.is_file():
            return None
        try:
            manifest = cls(**json.loads(path.read_text()))
            if not all(isinstance(part, dict) for part in dataclasses.asdict(manifest).values()):
                raise TypeError("its parts must be objects")
            return manifest
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: is not a manifest ({error}); delete it, and {MAKE}"
            ) from error

    def write(self, directory: str) -> None:
        """Writes it, with the files that the cache has now."""
        folder = pathlib.Path(directory)
        self.entries = {name: _hash(folder / name) for name in sorted(_files(folder))}
        with atomic_path(folder / FILE) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def differences(self) -> list[str]:
        """Differences of this machine from the one that the programs were compiled on."""
        here = machine()
        return [
            f"{name} is {here.get(name) or 'absent'}, was {self.machine.get(name) or 'absent'}"
            for name in sorted(here | self.machine)
            if here.get(name) != self.machine.get(name)
        ]

    def damaged(self, directory: str) -> list[str]:
        """Entries that are missing or have changed: JAX itself would never replace one."""
        files = {name: pathlib.Path(directory, name) for name in self.entries}
        return [n for n, f in files.items() if not f.is_file() or _hash(f) != self.entries[n]]


def _hash(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _files(directory: str | os.PathLike) -> set[str]:
    return {file.name for file in pathlib.Path(directory).glob("*-cache")}


def renew(directory: str) -> list[str]:
    """Prepares a cache to be filled: deletes entries that cannot be trusted.

    Returns:
      The problems found, as lines of text.

    Raises:
      InputError: a folder that cannot be written, or with programs but no manifest.
    """
    folder = pathlib.Path(directory)
    partial_file(folder / FILE).unlink()
    manifest, files = Manifest.read(directory), _files(directory)
    if manifest is None:
        if files:
            raise InputError(
                f"--cache={directory}: has {len(files)} compiled programs and no {FILE} that says "
                "where they are good; give an empty folder"
            )
        manifest, wrong = Manifest(machine()), []
    elif wrong := manifest.differences():
        _delete(folder, files)
        # XLA's own choices of algorithms, which JAX keeps beside its entries.
        shutil.rmtree(folder / "xla_gpu_per_fusion_autotune_cache_dir", ignore_errors=True)
        manifest, wrong = Manifest(machine()), [*wrong, "all is compiled anew"]
    else:
        damaged = manifest.damaged(directory)
        unknown = sorted(files - set(manifest.entries))
        _delete(folder, files & {*damaged, *unknown})
        wrong = [f"{name} was missing or damaged" for name in damaged]
        wrong += [f"{name} was not in the manifest" for name in unknown]
    # Before anything is compiled: then the machine of an interrupted run's entries is known.
    manifest.write(directory)
    return wrong


def _delete(folder, names):
    for name in names:
        (folder / name).unlink(missing_ok=True)


def point_jax_at(directory: str) -> None:
    """Programs come from this cache and go to it. Call it before anything is compiled."""
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(directory))


def use(directory: str, cfg: config_lib.Config, batch: int, vae_device: int | None) -> None:
    """Programs come from this cache, unless they were compiled for another machine.

    Warns, on stderr, of what does not fit: then programs are compiled when they are needed.

    Raises:
      InputError: a folder without a manifest.
    """
    manifest = Manifest.read(directory)
    if manifest is None:
        raise InputError(f"--compile_cache={directory}: no {FILE} in it; {MAKE}")
    if wrong := manifest.differences():
        _warn(directory, f"not used: {'; '.join(wrong)}")
        return
    if damaged := manifest.damaged(directory):
        _warn(directory, f"not used: {', '.join(damaged)} missing or damaged")
        return
    run = manifest.runs.get(run_id(cfg, batch, vae_device))
    if run is None:
        _warn(directory, "made for other settings, --batch or --vae_device")
    elif run["source"] != source():
        _warn(directory, "made by another version of the source")
    point_jax_at(directory)


def _warn(directory, what):
    message = (
        f"warning: --compile_cache={directory}: {what}; renew it with python -m launch.compile"
    )
    print(message, file=sys.stderr, flush=True)
