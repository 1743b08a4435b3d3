"""What a video shows, chunk by chunk: reads prompts in any of the four forms that `read` names."""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from longlive_jax import config as config_lib
from longlive_jax.data import sidecars
from longlive_jax.errors import InputError
from longlive_jax.files import names, regular

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_CHUNKS = 1_000_000  # of a video: two weeks of it; a larger number is a slip of the pen
MAX_STEPS = 1000  # of the solver, as of `config.Sample`
MAX_GUIDANCE = 1000
DURATIONS = "shot_durations.txt"
SCRIPT = "longlive_jax script"  # the format of a stream's script: shots, seed and settings
_KEYS = ("prompt", "chunks", "seconds", "cut", "image", "recache", "toward", "weight", "actions",
         "steps", "guidance")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One chunk of a video.

    prompt: as the model reads it.
    cut: whether a new shot begins with it.
    changed: whether its prompt differs from that of the chunk before it, inside a shot.
    recache: whether the visible past is brought under the prompt; None: as `sample.recache` says,
      where it changed.
    toward, weight: a blend: so much of the text is this prompt's embedding.
    steps, guidance: in place of sample.steps and sample.guidance_scale; None: these.
    """

    prompt: str
    cut: bool
    changed: bool = False
    recache: bool | None = None
    toward: str = ""
    weight: float = 0.0
    steps: int | None = None
    guidance: float | None = None

    def recaches(self, by_default: bool) -> bool:
        """Whether the visible past is run again, with `sample.recache` as the default."""
        return by_default and self.changed if self.recache is None else self.recache


@dataclasses.dataclass(frozen=True)
class Video:
    """A video to make. `image`, if any, is its first frame. `name` is unique in a `read`.

    script: of a stream's saved script (SCRIPT), all but its shots.
    actions: of each entry that it was made of its actions, a sidecar or a line of text, "" without,
      and for how many chunks; empty if none has any. `prompts.actions` reads them.
    """

    name: str
    chunks: tuple[Chunk, ...]
    image: pathlib.Path | None = None
    script: Mapping[str, Any] | None = None
    actions: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Shot:
    prompt: str
    chunks: int
    cut: bool
    recache: bool | None = None
    toward: str = ""
    weight: float = 0.0
    steps: int | None = None
    guidance: float | None = None


def read(
    path: str | os.PathLike | Sequence[Mapping[str, Any]],
    *,
    chunks: int,
    chunk_frames: int,
    scene_cut_prefix: str,
    chunks_per_shot: int = 0,
) -> list[Video]:
    """Reads the videos that `path` describes.

    The forms:
      a `.txt` file: each line that is not empty is the one prompt of a video.
      a folder of captions, `<path>/caption/` or `<path>`: each sub-folder is a video, each `.json`
        in it a shot with the prompt under "caption". Other names come before numbers, numbers in
        their order, and `global.json` is left out. Chunks of each shot: `shot_durations.txt` in the
        sub-folder, else `chunks_per_shot`, else an even split of `chunks`. The last shot is
        extended to fill `chunks`, and shots past `chunks` are dropped.
      a folder of images with prompts, `<path>/images/NAME.png` and `<path>/prompts/NAME.txt`, or
        both in `<path>`: each image is a video, each line of its prompt a shot, split evenly.
      a `.json` file, one video: `[{"prompt": "...", "chunks": 3, "cut": true}, ...]`. Instead of
        "chunks", "seconds" may be given, and is rounded up to whole chunks. "cut" (default true)
        begins a shot; false changes the prompt within a shot. The first entry may have an "image",
        a path relative to the file. "steps" and "guidance" are an entry's, in place of those of
        `config.Sample`. "actions" are those of an entry's pictures, in a sidecar, whose
        path is relative to the file too, or in a line of text (`data.sidecars.strings`).

    In all of them a cut reaches the model as `scene_cut_prefix` before the prompt of a shot's
    first chunk (once: it may be there already), except at the start of the video. Conversely a line
    of a `.txt` file that begins with it makes each chunk but the first a cut, as in the original.

    Args:
      path: file or folder; or the list of such a `.json` file itself.
      chunks: length of a video whose source does not give it.
      chunk_frames: latent frames of a chunk, to convert seconds.
      scene_cut_prefix: of `config.Sample`.
      chunks_per_shot: of captions in folders without `shot_durations.txt`; 0 for an even split.

    Returns:
      At least one video, each of at least one chunk, in the order of the file or of the names.

    Raises:
      InputError: anything wrong with the arguments or with what is found at `path`.
    """
    _in_range("chunks", chunks, 1)
    _in_range("chunk_frames", chunk_frames, 1)
    _in_range("chunks_per_shot", chunks_per_shot, 0)
    if not isinstance(path, str | os.PathLike):
        here = pathlib.Path("shots")
        return [_shot_list(here, path, chunks, chunk_frames, scene_cut_prefix)]
    try:
        return _read(pathlib.Path(path), chunks, chunk_frames, scene_cut_prefix, chunks_per_shot)
    except OSError as error:
        raise InputError(f"prompts: {path} cannot be read: {error}") from error


def _read(path, chunks, chunk_frames, prefix, per_shot) -> list[Video]:
    if not path.exists():
        raise InputError(
            f"prompts: {path} does not exist; give a .txt or .json file or a folder of captions"
        )
    if path.is_dir():
        return _read_folder(path, chunks, per_shot, prefix)
    if path.suffix.lower() == ".json":
        content = _json(path)
        script = None
        if isinstance(content, dict) and content.get("format") == SCRIPT:
            script = {key: value for key, value in content.items() if key != "shots"}
            content = content.get("shots")
        video = _shot_list(path, content, chunks, chunk_frames, prefix)
        return [dataclasses.replace(video, script=script)]
    if path.suffix.lower() in (".txt", ""):
        return _read_lines(path, chunks, prefix)
    raise InputError(
        f"prompts: {path} ends with {path.suffix!r}; it must be a .txt file (a prompt a line), a "
        f".json file (a list of shots) or a folder of captions"
    )


# The four forms.


def _read_lines(path: pathlib.Path, chunks: int, prefix: str) -> list[Video]:
    lines = _lines(path)
    digits = max(3, len(str(len(lines))))

    def entries(prompt):
        cut = bool(prefix) and prompt.startswith(prefix)
        return (Chunk(prompt, False), *(Chunk(prompt, cut),) * (chunks - 1))

    return [
        Video(f"{path.stem}-{i:0{digits}d}", entries(line)) for i, line in enumerate(lines, start=1)
    ]


def _read_folder(path: pathlib.Path, chunks: int, per_shot: int, prefix: str) -> list[Video]:
    if (path / "images").is_dir():
        return _read_images(path / "images", path / "prompts", chunks, prefix)
    root = path / "caption" if (path / "caption").is_dir() else path
    if root is path and any(names.spelled(p.with_suffix(".txt")).is_file() for p in _images(path)):
        return _read_images(path, path, chunks, prefix)
    folders = [path for path in names.entries(root) if path.is_dir()]
    if folders:
        return [_read_captions(folder, chunks, per_shot, prefix) for folder in folders]
    raise InputError(
        f"prompts: no captions found in {root}; needed is a sub-folder for each video with a .json "
        f"file for each shot, or images/NAME.png with prompts/NAME.txt (or NAME.png with NAME.txt)"
    )


def _read_captions(folder: pathlib.Path, chunks: int, per_shot: int, prefix: str) -> Video:
    files = [
        p for p in names.entries(folder, ".json") if p.name.lower() != "global.json" and p.is_file()
    ]
    if not files:
        raise InputError(
            f"prompts: no captions found in {folder}; each sub-folder is a video and needs a .json "
            f"file for each of its shots; add them or remove the folder"
        )
    prompts = [_caption(p) for p in sorted(files, key=_shot_order)]
    durations = _durations(folder / DURATIONS)
    if durations is None:
        durations = [per_shot] * len(prompts) if per_shot else _even(chunks, len(prompts))
    return Video(folder.name, _assemble(_shots(prompts, durations, chunks, folder), prefix))


def _read_images(images: pathlib.Path, prompts: pathlib.Path, chunks: int, prefix: str):
    pictures = _images(images)
    if not pictures:
        raise InputError(f"prompts: no image in {images}; known kinds: {', '.join(IMAGES)}")
    videos, stems = [], {}
    for picture in pictures:
        other = stems.setdefault(picture.stem, picture)
        if other is not picture:
            raise InputError(
                f"prompts: {other} and {picture} would both use the prompt {picture.stem}.txt; "
                f"rename one"
            )
        text = names.spelled(prompts / f"{picture.stem}.txt")
        if not text.is_file():
            raise InputError(f"prompts: {picture} has no prompt; write it to {text}")
        lines = _lines(text)
        shots = _shots(lines, _even(chunks, len(lines)), chunks, text)
        videos.append(Video(picture.stem, _assemble(shots, prefix), picture))
    return videos


def _shot_list(path: pathlib.Path, entries, chunks: int, chunk_frames: int, prefix: str) -> Video:
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f'prompts: {path} must be a list of at least one shot, [{{"prompt": "..."}}, ...]; '
            f"found {_kind(entries)}"
        )
    shots, image, actions = [], None, []
    for i, entry in enumerate(entries):
        where = f"prompts: {path}, entry {i + 1} of {len(entries)}"
        _check_entry(entry, where)
        length = entry.get("chunks", chunks)
        if "seconds" in entry:
            length = _chunks_of(entry["seconds"], chunk_frames, first=i == 0)
        cut, toward = i > 0 and entry.get("cut", True), entry.get("toward", "").strip()
        shots.append(
            _Shot(
                entry["prompt"].strip(), length, cut, entry.get("recache"), toward,
                float(entry.get("weight", 0)), entry.get("steps"), entry.get("guidance"),
            )
        )  # fmt: skip
        actions.append((_beside(path, entry.get("actions", "").strip()), length))
        if "image" in entry:
            image = _first_image(path, entry["image"], i, where)
    total = sum(shot.chunks for shot in shots)
    if total > MAX_CHUNKS:
        raise InputError(f"prompts: {path} has {total} chunks, the limit is {MAX_CHUNKS}; split it")
    given = tuple(actions) if any(what for what, _ in actions) else ()
    return Video(path.stem, _assemble(shots, prefix), image, actions=given)


# Shots to chunks.


def _assemble(shots: Iterable[_Shot], prefix: str) -> tuple[Chunk, ...]:
    """Writes the prefix before the first prompt of each shot that begins with a cut."""
    out: list[Chunk] = []
    before = None
    for shot in shots:
        # The prefix tells of a cut, so where a prompt has it already it stays at the cut only (and
        # at the start of the video, as written).
        plain = shot.prompt.removeprefix(prefix)
        first = prefix + plain if shot.cut else plain if out else shot.prompt
        changed = before is not None and not shot.cut and plain.strip() != before
        of_shot = Chunk(plain, False, steps=shot.steps, guidance=shot.guidance)
        if shot.weight:
            of_shot = dataclasses.replace(of_shot, toward=shot.toward, weight=shot.weight)
        out.append(
            dataclasses.replace(
                of_shot, prompt=first, cut=shot.cut, changed=changed, recache=shot.recache
            )
        )
        before = plain.strip()
        recache = None if shot.recache is None else False  # once, where it is said
        out.extend([dataclasses.replace(of_shot, recache=recache)] * (shot.chunks - 1))
    return tuple(out)


def _shots(prompts: Sequence[str], durations: Sequence[int], chunks: int, where) -> list[_Shot]:
    """As many shots as fit in `chunks`, which the last one fills."""
    shots, used = [], 0
    for prompt, duration in zip(prompts, durations):
        duration = min(duration, chunks - used)
        if duration > 0:
            shots.append(_Shot(prompt, duration, bool(shots)))
            used += duration
    shots[-1] = dataclasses.replace(shots[-1], chunks=shots[-1].chunks + chunks - used)
    if len(shots) < len(prompts):
        logging.warning(
            "%s: %d of %d shots have no place in a video of %d chunks and are left out; raise "
            "sample.chunks or shorten the shots",
            where, len(prompts) - len(shots), len(prompts), chunks,
        )  # fmt: skip
    return shots


def _even(chunks: int, shots: int) -> list[int]:
    each, extra = divmod(chunks, shots)
    return [each + (i < extra) for i in range(shots)]


def _chunks_of(seconds: float, chunk_frames: int, first: bool) -> int:
    """Whole chunks that last at least `seconds`."""
    frames = chunk_frames * config_lib.TEMPORAL_COMPRESSION
    # A video's first latent decodes to one frame and not four.
    missing = config_lib.TEMPORAL_COMPRESSION - 1 if first else 0
    # Rounded first: 4/3 s is 32 frames, not the 32.00000000000001 of the product.
    needed = math.ceil(round(seconds * config_lib.FRAMES_PER_SECOND, 6))
    return max(1, math.ceil((needed + missing) / frames))


# Files.


def _shot_order(path: pathlib.Path):
    numeric = re.fullmatch("[0-9]+", path.stem) is not None
    return numeric, int(path.stem) if numeric else 0, path.stem


def _caption(path: pathlib.Path) -> str:
    value = _json(path)
    caption = value.get("caption") if isinstance(value, dict) else None
    if not isinstance(caption, str):
        raise InputError(
            f'prompts: {path} must be an object with the text under "caption", '
            f'{{"caption": "..."}}; found {_kind(value if caption is None else caption)}'
        )
    if not caption.strip():
        raise InputError(f"prompts: the caption in {path} is empty; write what the shot shows")
    return caption.strip()


def _durations(path: pathlib.Path) -> list[int] | None:
    if not path.is_file():
        return None
    words = [word for word in re.split(r"[,\s]+", _text(path)) if word]
    try:
        values = [int(word) for word in words]
    except ValueError:
        values = []
    if not values or not all(1 <= value <= MAX_CHUNKS for value in values):
        raise InputError(
            f"prompts: {path} holds {' '.join(words)[:60]!r}; it must hold the chunks of each "
            f"shot, whole numbers of 1 to {MAX_CHUNKS} with commas or spaces between; or remove it"
        )
    return values


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in names.entries(folder, *IMAGES) if path.is_file()]


def _first_image(path: pathlib.Path, value: str, i: int, where: str) -> pathlib.Path:
    if i > 0:
        raise InputError(
            f'{where}: "image" is the first frame of the video and may be in entry 1 only'
        )
    image = path.parent / value
    if not image.is_file() or image.suffix.lower() not in IMAGES:
        raise InputError(
            f'{where}: "image": {value!r} must be an image file ({", ".join(IMAGES)}), relative to '
            f"the folder of the .json file; {image} is none"
        )
    return image


def _beside(path: pathlib.Path, actions: str) -> str:
    """Actions of an entry; a sidecar's path is relative to the file of shots."""
    return str(path.parent / actions) if sidecars.is_file(actions) else actions


def _check_entry(entry, where: str) -> None:
    if not isinstance(entry, dict):
        raise InputError(f'{where} must be an object {{"prompt": "..."}}; found {_kind(entry)}')
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(_KEYS)}")
    if "prompt" not in entry:
        raise InputError(f'{where} has no "prompt"; write what the shot shows')
    wanted = {"prompt": str, "chunks": int, "seconds": (int, float), "cut": bool, "image": str,
              "recache": bool, "toward": str, "weight": (int, float), "actions": str,
              "steps": int, "guidance": (int, float)}  # fmt: skip
    names = {"prompt": "text", "chunks": "a whole number", "seconds": "a number",
             "cut": "true or false", "image": "a path", "recache": "true or false",
             "toward": "text", "weight": "a number",
             "actions": "a sidecar or a line of text", "steps": "a whole number",
             "guidance": "a number"}  # fmt: skip
    for key, value in entry.items():
        if not isinstance(value, wanted[key]) or (
            isinstance(value, bool) and wanted[key] is not bool
        ):
            raise InputError(f'{where}: "{key}": {value!r} must be {names[key]}')
    if not entry["prompt"].strip():
        raise InputError(f'{where}: "prompt" is empty; write what the shot shows')
    if "chunks" in entry and "seconds" in entry:
        raise InputError(f'{where} has both "chunks" and "seconds"; give one of them')
    if ("toward" in entry) != ("weight" in entry) or not 0 <= entry.get("weight", 0) <= 1:
        raise InputError(
            f'{where}: a blend needs "toward", a prompt, and "weight", 0 to 1: how much of it'
        )
    if not 1 <= entry.get("chunks", 1) <= MAX_CHUNKS:
        raise InputError(f'{where}: "chunks": {entry["chunks"]} must be 1 to {MAX_CHUNKS}')
    if not 1 <= entry.get("steps", 1) <= MAX_STEPS:
        raise InputError(f'{where}: "steps": {entry["steps"]} must be 1 to {MAX_STEPS}')
    if not -MAX_GUIDANCE <= entry.get("guidance", 1) <= MAX_GUIDANCE:  # NaN fails
        raise InputError(
            f'{where}: "guidance": {entry["guidance"]} must be {MAX_GUIDANCE} or less; try 3'
        )
    if not 0 < entry.get("seconds", 1) <= MAX_CHUNKS:
        raise InputError(
            f'{where}: "seconds": {entry["seconds"]} must be above 0, {MAX_CHUNKS} at most'
        )


def _in_range(name: str, value: int, least: int) -> None:
    if not least <= value <= MAX_CHUNKS:
        raise InputError(f"{name}={value} must be {least} to {MAX_CHUNKS}")


def _lines(path: pathlib.Path) -> list[str]:
    # Not splitlines, which also splits at characters that are no line ends to an editor.
    lines = [line.strip() for line in _text(path).split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"prompts: {path} is empty; write a prompt to each line")
    return lines


def _text(path: pathlib.Path) -> str:
    try:
        content = regular.read(path, regular.MAX_TEXT)
        # As text files have it, whatever ends their lines.
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompts: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except ValueError as error:
        raise InputError(f"prompts: {path} cannot be read: {error}") from error


def _json(path: pathlib.Path):
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"prompts: {path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except (RecursionError, ValueError) as error:  # absurdly deep or long
        raise InputError(f"prompts: {path} is not JSON that can be read: {error}") from error


def _kind(value) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        type(None): "null",
        bool: "a boolean",
    }
    return names.get(type(value), "a number") + (" without items" if value in ({}, []) else "")
