"""Short videos as arrays in memory, which the autoencoder is trained and measured on."""

import concurrent.futures
import os
import pathlib
from typing import NamedTuple

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.config import TEMPORAL_COMPRESSION
from longlive_jax.data.clips import sample_folders
from longlive_jax.data.video_reader import VideoFile, VideoInfo, probe
from longlive_jax.errors import InputError
from longlive_jax.files.names import entries


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

    def cuts(self, length: int) -> np.ndarray:
        """int32 [window]: first frames of windows that have the end of one file and the start of
        the next, the next from a latent's first frame on, as a stream's cuts are.
        """
        before = np.arange(1, length, TEMPORAL_COMPRESSION)
        lengths = np.diff(self.starts)
        windows = [
            start - before[(before <= behind) & (length - before <= ahead)]
            for start, behind, ahead in zip(self.starts[1:-1], lengths[:-1], lengths[1:])
        ]
        return np.concatenate([*windows, ()]).astype(np.int32)


def read_videos(cfg: config_lib.Config) -> tuple[Videos, Videos]:
    """The files data.path/video/*/*.mp4 for training, and those held out.

    Raises:
      InputError: no files, too few folders to hold some out, a file that is damaged, too short or
        of another size than the config's, or more frames than train_vae.memory_gib.
    """
    root = pathlib.Path(cfg.data.path, "video")
    files = {folder: entries(folder, ".mp4") for folder in sample_folders(root)}
    folders = [folder for folder in files if files[folder]]
    if not folders:
        raise InputError(
            f"data.path={cfg.data.path!r}: no {root}/*/*.mp4; make videos with "
            "`python -m launch.make_tiny_world --output=DIR`, and give --config.data.path=DIR"
        )
    few = cfg.train_vae.held_out
    if len(folders) <= few:
        raise InputError(
            f"{root}: {len(folders)} folders of videos, train_vae.held_out={few} leaves none "
            "to train on; lower it, or make more videos"
        )
    groups = [
        [file for folder in part for file in files[folder]]
        for part in (folders[:-few], folders[-few:])
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
        train, held_out = (_read(files, i, cfg, pool) for files, i in zip(groups, infos))
    return train, held_out


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
