"""A run that trains a VAE: videos into memory, steps into a folder, measurements out of it.

A run is a function of its config and its videos; one that is started again goes on from its last
saved step with the same numbers.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.data.video import VideoFile, VideoInfo, probe
from longlive_jax.errors import InputError
from longlive_jax.files import versioned
from longlive_jax.files.atomic import atomic_path
from longlive_jax.training import autoencoder

# Settings that a run may be continued with other values of.
_FREE = ("train_vae.memory_gib", "train_vae.save_every", "train_vae.log_every")


# Videos.


class Videos(NamedTuple):
    """Decoded files, one after the other.

    paths: one a file.
    frames: uint8 [frame, height, width, 3].
    starts: int [file + 1], where each file's frames begin; last, their number.
    """

    paths: tuple[pathlib.Path, ...]
    frames: np.ndarray
    starts: np.ndarray

    def windows(self, length: int, stride: int) -> np.ndarray:
        """int32 [window]: first frames of windows of `length` that lie in one file."""
        files = [
            np.arange(a, b - length + 1, stride) for a, b in zip(self.starts[:-1], self.starts[1:])
        ]
        return np.concatenate(files).astype(np.int32)


def read_videos(cfg: config_lib.Config) -> tuple[Videos, Videos]:
    """The files data.path/video/*/*.mp4 for training, and those held out.

    Raises:
      InputError: no files, too few folders to hold some out, a file that is damaged, too short or
        of another size than the config's, or more frames than train_vae.memory_gib.
    """
    root = pathlib.Path(cfg.data.path, "video")
    folders = sorted({file.parent for file in root.glob("*/*.mp4")})
    if not folders:
        raise InputError(
            f"data.path={cfg.data.path!r}: no {root}/*/*.mp4; make videos with "
            "`python -m launch.make_tiny_world --output=DIR`, and give --config.data.path=DIR"
        )
    held_out = cfg.train_vae.held_out
    if len(folders) <= held_out:
        raise InputError(
            f"{root}: {len(folders)} folders of videos, train_vae.held_out={held_out} leaves none "
            "to train on; lower it, or make more videos"
        )
    groups = [
        [file for folder in part for file in sorted(folder.glob("*.mp4"))]
        for part in (folders[:-held_out], folders[-held_out:])
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        infos = [list(pool.map(probe, files)) for files in groups]
        for files, found in zip(groups, infos):
            for file, info in zip(files, found):
                _check_file(file, info, cfg)
        need = sum(i.frames for part in infos for i in part) * _frame_bytes(cfg) / 2**30
        if need > cfg.train_vae.memory_gib:
            raise InputError(
                f"{root}: {need:.2f} GiB of frames, more than "
                f"train_vae.memory_gib={cfg.train_vae.memory_gib}; raise it if a device has so "
                "much to spare, or give fewer videos"
            )
        train, held = (_read(files, i, cfg, pool) for files, i in zip(groups, infos))
    return train, held


def _check_file(file: pathlib.Path, info: VideoInfo, cfg: config_lib.Config) -> None:
    wanted = (cfg.video.height, cfg.video.width)
    if (info.height, info.width) != wanted:
        raise InputError(
            f"{file}: {info.height}x{info.width} pixels, the config says {wanted[0]}x{wanted[1]}; "
            f"give --config.video.height={info.height} --config.video.width={info.width}, or "
            "videos of that size"
        )
    if info.frames < cfg.train_vae.frames:
        raise InputError(
            f"{file}: {info.frames} frames, fewer than train_vae.frames={cfg.train_vae.frames}; "
            "lower it, or remove the file"
        )


def _frame_bytes(cfg):
    return cfg.video.height * cfg.video.width * 3


def _read(files, infos, cfg, pool) -> Videos:
    starts = np.cumsum([0, *(i.frames for i in infos)])
    frames = np.empty((starts[-1], cfg.video.height, cfg.video.width, 3), np.uint8)

    def one(i):
        with VideoFile(files[i]) as video:
            for k, frame in enumerate(video):
                frames[starts[i] + k] = frame

    list(pool.map(one, range(len(files))))  # raises what a thread raised
    return Videos(tuple(files), frames, starts)


# A run.


def fit(
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    videos: Videos,
    directory: str | os.PathLike,
    show: Callable[[str], None] = print,
) -> autoencoder.State:
    """Trains to the last step, on from the last one that `directory` holds.

    `directory` gets config.json, metrics.jsonl (a line every train_vae.log_every steps; "seconds"
    is of a step) and state/, an Orbax checkpoint of the last saved step.

    Raises:
      InputError: `directory` is of a run with other settings or videos or cannot be written; or
        the loss is not finite.
    """
    root = pathlib.Path(os.path.abspath(directory))
    _claim(root, cfg, videos)
    t, step = cfg.train_vae, autoencoder.make_step(cfg, mesh)
    frames = autoencoder.place(videos.frames, mesh)
    windows = autoencoder.place(videos.windows(t.frames, 1), mesh)
    keep = ocp.training.preservation_policies.LatestN(1)
    with ocp.training.Checkpointer(root / "state", preservation_policy=keep) as saved:
        state = autoencoder.init(cfg, mesh)
        if saved.latest is not None:
            state = _load(saved, state, root)
        done = int(state.step)
        log = root / "metrics.jsonl"
        _cut(log, done)
        if done:
            show(f"on from step {done} of {root}")
        clock, last = time.perf_counter(), done
        while done < t.steps:
            state, metrics = step(state, frames, windows)
            done += 1
            save = done % t.save_every == 0 or done == t.steps
            if not save and done % t.log_every:
                continue
            line = {name: float(value) for name, value in metrics.items()}
            seconds = (time.perf_counter() - clock) / (done - last)
            _record(log, {"step": done} | line | {"seconds": seconds}, show)
            if save:
                saved.save(done, state)
            clock, last = time.perf_counter(), done
    return state


def _claim(root: pathlib.Path, cfg: config_lib.Config, videos: Videos) -> None:
    """Makes a run's folder, or refuses one that is another run's."""
    settings = {name: dataclasses.asdict(getattr(cfg, name)) for name in ("vae", "train_vae")} | {
        "dtype": cfg.dtype,
        "videos": {"files": len(videos.paths), "shape": videos.frames.shape},
    }
    wanted = json.loads(json.dumps(settings))  # tuples as lists, as they are read
    file = root / "config.json"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            versioned.write_json(file, wanted)
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--workdir={root}: {error}; give another") from error
    wanted, found = _flat(wanted), _flat(found)
    for name in sorted(set(wanted) | set(found)):
        if name not in _FREE and wanted.get(name) != found.get(name):
            raise InputError(
                f"--workdir={root}: holds a run with {name}={found.get(name)}, this one has "
                f"{wanted.get(name)}; give the same settings and videos, or a new --workdir"
            )


def _flat(settings):
    return {".".join(path): value for path, value in params_lib.flatten(settings).items()}


def _load(saved, state: autoencoder.State, root: pathlib.Path) -> autoencoder.State:
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    try:
        return saved.load(saved.latest, template)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"{root / 'state'}: is damaged ({reason}); remove {root} and start again"
        ) from error


def _cut(log: pathlib.Path, done: int) -> None:
    """Drops the lines of steps that were not saved, or of a folder's earlier run."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    with atomic_path(log) as partial:
        partial.write_text("".join(x for x in lines if _step_of(x) <= done))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a run that was killed
        return math.inf


def _record(log: pathlib.Path, line: dict, show: Callable[[str], None]) -> None:
    show("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
    if not all(math.isfinite(line[name]) for name in ("loss", "grad_norm")):
        raise InputError(
            f"step {line['step']}: loss {line['loss']}, gradient {line['grad_norm']}; lower "
            "--config.train_vae.learning_rate and start in a new --workdir"
        )
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


# Measurements.


def statistics(
    params: params_lib.Tree, cfg: config_lib.Config, mesh: jax.sharding.Mesh, videos: Videos
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each latent channel over all videos, float64 [z_dim]."""
    total = square = np.zeros(cfg.vae.z_dim)
    count = 0
    encode = autoencoder.make_encode(cfg, mesh)
    for _, latents in _batches(encode, params, cfg, mesh, videos):
        values = latents.reshape(-1, cfg.vae.z_dim).astype(np.float64)
        total, square = total + values.sum(0), square + (values**2).sum(0)
        count += len(values)
    mean = total / count
    return mean, np.sqrt(square / count - mean**2)


def reconstructions(
    params: params_lib.Tree, cfg: config_lib.Config, mesh: jax.sharding.Mesh, videos: Videos
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of clips, one after the other in each file, and of what the VAE makes of them.

    Yields:
      Two uint8 [batch, frame, height, width, 3].
    """
    offsets = np.arange(cfg.train_vae.frames)
    reconstruct = autoencoder.make_reconstruct(cfg, mesh)
    for starts, pictures in _batches(reconstruct, params, cfg, mesh, videos):
        yield videos.frames[starts[:, None] + offsets], pictures


def _batches(program, params, cfg, mesh, videos):
    """(starts, result) of `program` for clips that cover the files, a batch at a time."""
    params, frames = autoencoder.place(params, mesh), autoencoder.place(videos.frames, mesh)
    starts = videos.windows(cfg.train_vae.frames, cfg.train_vae.frames)
    size = cfg.train_vae.batch_size
    for i in range(0, len(starts), size):
        some = starts[i : i + size]
        padded = np.resize(some, size)  # repeats: one program for all batches
        batch = jax.device_put(padded, jax.NamedSharding(mesh, jax.P(autoencoder.ROWS)))
        yield some, np.asarray(program(params, frames, batch))[: len(some)]


def psnr(squared_error: float) -> float:
    """dB of a mean squared error of pixels 0..255."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-12))
