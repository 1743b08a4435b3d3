"""Where weights come from: a file, a folder of files, or a repository of the Hugging Face hub."""

import os
import pathlib
import re
import struct
from typing import Any

from longlive_jax.checkpoints import pickle_reader, safetensors
from longlive_jax.errors import InputError
from longlive_jax.files import versioned
from longlive_jax.files.names import entries

# Where downloaded folders keep each part; the first that exists is taken. "" is the folder itself,
# when it has safetensors files.
_PLACES = {
    "dit": ("", "transformer", "model.pt", "model_bf16.pt", "model_4o6.pt"),
    "vae": ("Wan2.2_VAE.pth", "vae", "vae.safetensors", ""),
    "umt5": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder", "umt5.safetensors", ""),
    "lora": ("adapter_model.safetensors", "model.pt", ""),
    "tokenizer": tuple(
        f"{folder}{file}"
        for file in ("tokenizer.json", "spiece.model")
        for folder in ("", "tokenizer/", "google/umt5-xxl/")
    ),
}
_INDEX = {"weight_map": {str: str}}
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>\w[\w.-]*))?(?:/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Located(str):
    """The path of a local file or folder, and where it is from.

    Attributes:
      origin: what a checkpoint keeps of it: the name of a file, or `hf://owner/name@COMMIT[/file]`.
    """

    origin: str

    def __new__(cls, path: str, origin: str | None = None):
        located = super().__new__(cls, path)
        located.origin = origin or os.path.basename(path)
        return located


def locate(source: str, part: str) -> Located:
    """The local file or folder of safetensors files that holds `part`; may download it.

    Args:
      source: a path, or `hf://owner/name[@revision][/file]`; the revision is a branch, a tag or a
        commit, by default the repository's main branch.
      part: "dit", "vae", "umt5", "lora" or "tokenizer".

    Raises:
      InputError: nothing there holds the part.
    """
    if not source.startswith("hf://"):
        return Located(_find(source, source, part))
    path, origin = _download(source, part)
    return Located(_find(path, source, part), origin)


def _find(local: str, source: str, part: str) -> str:
    path = pathlib.Path(local)
    if os.path.isfile(path):  # pathlib raises for names that no file can have
        return str(path)
    if not os.path.exists(path):
        raise InputError(f"--{part}={source}: there is no such file or folder")
    for place in _PLACES[part]:
        found = path / place
        if found.is_file() or (
            found.is_dir() and any(".safetensors" in p.name for p in entries(found))
        ):
            return str(found)
    places = ", ".join(p or "*.safetensors" for p in _PLACES[part])
    raise InputError(f"--{part}={source}: the folder has none of {places}; give the file itself")


def read(path: str) -> Any:
    """The content of a located file or folder: nested dicts with unread tensors.

    A file's first bytes decide its kind, not its name.

    Raises:
      InputError: unreadable, damaged or of another kind.
    """
    if os.path.isdir(path):
        return _read_folder(pathlib.Path(path))
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            start = f.read(9)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    looks_safe = (
        len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 32
    )
    if looks_safe or (path.endswith(".safetensors") and size and not start.startswith(b"PK")):
        tensors, metadata = safetensors.read(path)
        content = metadata | tensors
    else:
        content = pickle_reader.read(path)
    settings = os.path.join(os.path.dirname(path), "adapter_config.json")
    if isinstance(content, dict) and os.path.isfile(settings):  # PEFT keeps a LoRA's alpha there
        content |= {"adapter_config": versioned.read_json(settings, {str: object})}
    return content


def _read_folder(folder: pathlib.Path) -> dict[str, Any]:
    """All tensors of a folder: from the files of its index, else from all its safetensors files."""
    indices = [p for p in entries(folder) if p.name.endswith(".safetensors.index.json")]
    if len(indices) > 1:
        names = ", ".join(p.name for p in indices)
        raise InputError(f"{folder}: has several index files, {names}; give one's folder")
    if indices:
        where = versioned.read_json(indices[0], _INDEX)["weight_map"]
        files = sorted(set(where.values()))
        absent = [f for f in files if os.path.basename(f) != f or not os.path.isfile(folder / f)]
        if absent:
            raise InputError(
                f"{folder}: {len(absent)} of {len(files)} files of its index are not there: "
                f"{', '.join(f[:80] for f in absent[:5])}; copy or download them"
            )
        paths = [folder / f for f in files]
    else:
        paths = entries(folder, ".safetensors")
    tensors: dict[str, Any] = {}
    for path in paths:
        for key, t in safetensors.read(path)[0].items():
            if key in tensors:
                raise InputError(
                    f"{folder}: {key} is in {tensors[key].file} and in {path.name}; give the file"
                )
            tensors[key] = t
    return tensors


def _download(source: str, part: str) -> tuple[str, str]:
    """A local path, and the address of what lies there: with the commit that was downloaded."""
    match = _HUB.fullmatch(source)
    if not match:
        raise InputError(
            f"--{part}={source}: must be hf://owner/name or hf://owner/name/file, with @revision "
            "after the name if it is not to be the newest"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"--{part}={source}: needs huggingface_hub; run `pip install huggingface_hub`"
        ) from error
    repo, commit = match["repo"], match["revision"]
    try:
        if not (commit and _COMMIT.fullmatch(commit)):
            # First of all: what is listed and all files are then of this one commit.
            commit = huggingface_hub.model_info(repo, revision=commit).sha
        origin = f"hf://{repo}@{commit}"

        def file(name: str) -> tuple[str, str]:
            path = huggingface_hub.hf_hub_download(repo, name, revision=commit)
            return path, f"{origin}/{name}"

        if match["file"]:
            return file(match["file"])
        there = huggingface_hub.list_repo_files(repo, revision=commit)
        for place in _PLACES[part]:
            if place in there:
                return file(place)
            weights = re.compile(rf"{re.escape(place)}/?[^/]+\.(safetensors(\.index\.json)?|json)")
            wanted = [f for f in there if weights.fullmatch(f)]
            if any(".safetensors" in f for f in wanted):
                root = huggingface_hub.snapshot_download(
                    repo, revision=commit, allow_patterns=wanted
                )
                return root, f"{origin}/{place}".rstrip("/")
    except Exception as error:  # whatever the network and the hub can do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--{part}={source}: {reason}") from error
    raise InputError(
        f"--{part}={source}: the repository has none of "
        f"{', '.join(p or '*.safetensors' for p in _PLACES[part])}; add /FILE to the address"
    )
