"""Training videos into latents and prompt embeddings, read by data.cached=True.

    python -m launch.encode_dataset --config=configs/train_ar_5b.py --config.data.path=VIDEOS \\
        --checkpoint=CKPT --output=DIR [--epochs=1]

Every folder of VIDEOS/video gives one sample an epoch, from another start each time. With an action
path in the config each video has a sidecar, whose rows are stored beside the latents. The devices
of config.mesh encode together: most clips an hour with all of them on mesh.data. Stopped at any
moment, the same command goes on after the last whole file.

On many hosts run the same command on each, as often as there are devices or machines, with DIR on a
disk that they share: they deal the files out among themselves, whoever comes later joins, and what
one leaves when it dies the others take up. The result is that of one process, to the bit. Then
train with --config.data.path=DIR --config.data.cached=True.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from launch import command
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import networks
from longlive_jax.data import progress as progress_lib
from longlive_jax.data import records
from longlive_jax.data.clips import VideoFolder
from longlive_jax.data.images import to_float
from longlive_jax.data.progress import Progress
from longlive_jax.data.source import Health, Sample, Source, batches
from longlive_jax.errors import InputError
from longlive_jax.files import folders, remote
from longlive_jax.files.atomic import remove_abandoned
from longlive_jax.files.names import as_text
from longlive_jax.files.remote import AnyPath
from longlive_jax.models import umt5
from longlive_jax.models.vae_spec import SHARDED, check_mesh
from longlive_jax.prompts import pictures

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert.")
flags.DEFINE_string("output", None, "The folder to make, or to go on with.")
flags.DEFINE_integer("epochs", 1, "Samples of each folder of videos.", lower_bound=1)

_PROCESS = f"{socket.gethostname()}:{os.getpid()}"


def main() -> None:
    start = time.monotonic()
    cfg = _config()
    source = VideoFolder(cfg)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    check_mesh(mesh, _replicas(mesh), _latent_shape(cfg)[2])
    networks.check(FLAGS.checkpoint, "vae", cfg, networks.ENCODER)
    if not cfg.train.text_encoder:
        networks.read_tokenizer(FLAGS.checkpoint, cfg)
    settings = _settings(cfg, source)
    folder = remote.path(FLAGS.output)
    if not (folder / records.MANIFEST).is_file():
        whole_batches = math.ceil(records.CLIPS_PER_FILE / _replicas(mesh)) * _replicas(mesh)
        head = {"settings": settings, "clips_per_file": whole_batches}
        with Progress(folder, head) as progress:
            if not progress.finished:
                _write(cfg, mesh, source, progress)
    had = records.read_manifest(folder)["settings"]
    folders.check_settings(f"--output={folder}", had, settings)
    progress_lib.remove(folder)
    print(f"{_summary(folder)}, {time.monotonic() - start:.1f} s: {as_text(folder)}")


def _write(cfg, mesh, source: Source, progress: Progress) -> None:
    _encode(cfg, mesh, source, progress)
    if not cfg.train.text_encoder:
        _embed(cfg, mesh, progress)
    _show_rates(progress, mesh.size)
    progress.finish(functools.partial(_manifest, cfg, progress))


def _config() -> config_lib.Config:
    cfg = command.config()
    if not FLAGS.output:
        raise InputError("--output is missing; give the folder to make")
    command.check_apart([FLAGS.output], [], networks.folders(FLAGS.checkpoint))
    if cfg.data.cached:
        raise InputError(
            "config: data.cached=True, but videos are encoded here; give "
            "--config.data.cached=False and the folder of videos as --config.data.path"
        )
    if cfg.vae.z_dim != cfg.model.in_dim:
        raise InputError(
            f"config: vae.z_dim={cfg.vae.z_dim} must equal model.in_dim={cfg.model.in_dim}, since "
            "the transformer reads the VAE's latents"
        )
    config_lib.validate_training(cfg)
    return cfg


def _settings(cfg: config_lib.Config, source: Source) -> dict:
    """Settings that the files depend on, by flag name; the mesh affects rounding only."""
    data = ("path", "max_chunks_per_shot", "single_shot", "allow_padding", "min_chunks")
    names = {
        "data": data,
        "train": ("seed", "latent_frames", "text_encoder"),
        "video": ("height", "width"),
        "sample": ("scene_cut_prefix",),
        "model": ("chunk_frames", "in_dim"),
        "vae": [field.name for field in dataclasses.fields(cfg.vae)],
    }
    if not cfg.train.text_encoder:
        names["model"] += ("text_len", "text_dim")
        names["umt5"] = [field.name for field in dataclasses.fields(cfg.umt5)]
    values = {f"{s}.{k}": getattr(getattr(cfg, s), k) for s in names for k in names[s]}
    return (
        values
        | records.action_settings(cfg.model.actions)
        | {
            "data.path": os.path.abspath(cfg.data.path),
            "dtype": cfg.dtype,
            "--epochs": FLAGS.epochs,
            "--checkpoint": remote.absolute(FLAGS.checkpoint),
            "the number of folders": len(source),
        }
    )


def _encode(cfg, mesh, source: Source, progress: Progress) -> None:
    """Writes files of latents until there are all, by whichever process."""
    total, size = len(source) * FLAGS.epochs, progress.head["clips_per_file"]
    done = _lines(progress, "latents")
    for kind in ("shard", "actions"):
        records.Shards(progress.folder, _shards(done, kind))  # refuses files that are gone
    health = _health(cfg, progress)
    load = functools.cache(
        lambda: networks.load(FLAGS.checkpoint, "vae", cfg, mesh, networks.ENCODER)
    )
    reader, bar = _Reader(cfg, source), tqdm.tqdm(total=total, unit=" clips", disable=None)
    with contextlib.closing(reader), bar:
        for number in progress.work("latents", math.ceil(total / size)):
            first, count = number * size, min(size, total - number * size)
            bar.update(sum(len(x["read"]) for x in _lines(progress, "latents")) - bar.n)
            start, line = (
                time.monotonic(),
                {"kind": "latents", "read": [], "prompts": [], "chunks": []},
            )
            samples = _take(reader.read(first, count), health, line, bar)
            rows: list[bytes] = []
            path = progress.folder / f"latents-{number:05d}.arrayrecord"
            remove_abandoned(path)
            shard = records.write_shard(path, _packed(cfg, mesh, load, samples, rows))
            if cfg.model.actions.kind != "none":
                path = progress.folder / f"actions-{number:05d}.arrayrecord"
                line["actions"] = dataclasses.asdict(records.write_shard(path, rows))
            line |= {"by": _PROCESS, "seconds": round(time.monotonic() - start, 3)}
            progress.add(line | {"shard": dataclasses.asdict(shard)})


def _health(cfg, progress: Progress) -> Health:
    """The failures that are known, and a report of them, made again from the lines."""
    report = progress.folder / records.FAILURES
    report.unlink(missing_ok=True)
    health = Health(cfg.data.max_bad_share, report)
    lines = _lines(progress, "latents")
    for name, failures in itertools.chain.from_iterable(line["read"] for line in lines):
        health.add(Sample(name, (), 0, failures=tuple((path, why) for path, why in failures)))
    return health


class _Reader:
    """The samples by their number. Those that follow each other come from one stream."""

    def __init__(self, cfg: config_lib.Config, source: Source):
        self._seed, self._workers, self._source = cfg.train.seed, cfg.data.workers, source
        self._stream, self._next = None, -1

    def read(self, first: int, count: int) -> Iterator[Sample]:
        if first != self._next:
            self.close()
            self._stream = batches(self._source, (0,), 1, first, self._seed, self._workers)
        self._next = first + count
        for (sample,) in itertools.islice(self._stream, count):
            yield sample

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _take(samples: Iterable[Sample], health: Health, line: dict, bar) -> Iterator[Sample]:
    """The samples to encode; what `progress` needs of them goes into `line`.

    For a folder that gives no sample the source gives another folder's, which has a number of its
    own: it is left out.
    """
    for sample in samples:
        health.add(sample)
        bar.update()
        line["read"].append((sample.name, sample.failures))
        if sample.skipped:
            continue
        line["chunks"].append(sample.chunks)
        line["prompts"] = list(dict.fromkeys([*line["prompts"], *sample.prompts]))
        yield sample


def _packed(cfg, mesh, load, samples: Iterable[Sample], rows: list[bytes]) -> Iterator[bytes]:
    """Records of samples; each replica of the mesh encodes one sample of a batch.

    load: gives the encoder's weights. rows: gets the records of the samples' actions.
    """
    replicas = _replicas(mesh)
    for batch in itertools.batched(samples, replicas):
        frames = [sample.frames for sample in batch]
        frames += frames[-1:] * (replicas - len(frames))
        latents = pictures.encode(
            cfg, load(), mesh, functools.partial(_read, mesh, frames), len(frames[0])
        )
        for sample, one in zip(batch, latents):
            if not np.isfinite(one).all():
                raise InputError(
                    f"{as_text(sample.name)}: its latents are not finite (NaN or infinity): the "
                    "VAE's weights are damaged or do not belong to this config; convert them again"
                )
            fields = {"name": sample.name, "prompts": sample.prompts, "chunks": sample.chunks}
            if sample.actions is not None:
                rows.append(records.pack({"name": sample.name}, sample.actions))
            yield records.pack(fields, one.astype(cfg.compute_dtype))


def _read(mesh, frames: list[np.ndarray], start: int, stop: int) -> jax.Array:
    """Frames start..stop-1 of each clip in [-1, 1], [clip, frame, height, width, 3]."""
    where = mesh_lib.sharding(mesh, SHARDED)
    pixels = np.stack([clip[start:stop] for clip in frames])
    return _floats(jax.device_put(pixels, where), where)


# On the devices: the host would take as long for it as a device for the latents. By a table,
# because XLA replaces the division by 127.5 by a product, which rounds otherwise.
@functools.partial(jax.jit, static_argnums=1)
def _floats(pixels, where):
    table = jnp.asarray(to_float(np.arange(256, dtype=np.uint8)))
    return table.at[pixels].get(mode="promise_in_bounds", out_sharding=where)


def _embed(cfg, mesh, progress: Progress) -> None:
    """Writes the files of embeddings that are missing."""
    prompts = _prompts(progress)
    records.Shards(progress.folder, _shards(_lines(progress, "text")))  # refuses what is gone
    read = networks.read_tokenizer(FLAGS.checkpoint, cfg)
    load = functools.cache(lambda: networks.load(FLAGS.checkpoint, "umt5", cfg, mesh))
    groups = list(itertools.batched(prompts, records.PROMPTS_PER_FILE))
    with tqdm.tqdm(total=len(prompts), unit=" prompts", disable=None) as bar:
        for number in progress.work("text", len(groups)):
            group, path = groups[number], progress.folder / f"text-{number:05d}.arrayrecord"
            remove_abandoned(path)
            ids, mask = read(group, cfg.model.text_len)
            rows = umt5.encode_prompts(
                load(), cfg.umt5, ids, mask, cfg.model.text_len, cfg.compute_dtype
            )
            shard = records.write_shard(
                path,
                (
                    records.pack({"prompt": prompt}, row[:length])
                    for prompt, row, length in zip(group, rows, mask.sum(axis=1))
                ),
            )
            progress.add({"kind": "text", "shard": dataclasses.asdict(shard)})
            bar.update(sum(shard.count for shard in _shards(_lines(progress, "text"))) - bar.n)


def _show_rates(progress: Progress, devices: int) -> None:
    """Prints what this process encoded in a second, a device, and all processes together."""
    clips: collections.Counter = collections.Counter()
    seconds: collections.Counter = collections.Counter()
    for line in _lines(progress, "latents"):
        if line.get("seconds"):
            clips[line["by"]] += len(line["chunks"])
            seconds[line["by"]] += line["seconds"]
    rates = {by: clips[by] / seconds[by] for by in clips}
    if own := rates.get(_PROCESS):
        print(
            f"{clips[_PROCESS]} clips here, {own:.3g} a second, {own / devices:.3g} a device; in "
            f"all {sum(clips.values())} by {len(rates)} process(es), {sum(rates.values()):.3g} a "
            "second",
            file=sys.stderr,
        )


def _manifest(cfg, progress: Progress) -> dict:
    latents, health = _lines(progress, "latents"), _health(cfg, progress)
    return dict(
        samples=sum(len(line["chunks"]) for line in latents),
        dtype=cfg.dtype,
        latent_shape=_latent_shape(cfg),
        least_chunks=min(min(line["chunks"], default=math.inf) for line in latents),
        failures=len(health.failures),
        latents=_shards(latents),
        text=_shards(_lines(progress, "text")),
        **({"actions": acted} if (acted := _shards(latents, "actions")) else {}),
        prompts=_prompts(progress),
        settings=progress.head["settings"],
    )


def _lines(progress, kind: str) -> list[dict]:
    return [line for line in progress.lines if line["kind"] == kind]


def _shards(lines, kind: str = "shard") -> list[records.Shard]:
    return [records.Shard(**line[kind]) for line in lines if kind in line]


def _prompts(progress) -> list[str]:
    """The distinct prompts, in the order of their first use."""
    lines = _lines(progress, "latents")
    return list(dict.fromkeys(itertools.chain.from_iterable(line["prompts"] for line in lines)))


def _replicas(mesh: jax.sharding.Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _latent_shape(cfg: config_lib.Config) -> tuple[int, int, int, int]:
    """[latent frame, h, w, channel] of a sample."""
    scale = config_lib.SPATIAL_COMPRESSION
    size = cfg.video.height // scale, cfg.video.width // scale
    return cfg.train.latent_frames, *size, cfg.vae.z_dim


def _summary(folder: AnyPath) -> str:
    manifest = records.read_manifest(folder)
    files = [*manifest["latents"], *manifest["text"], *manifest["actions"]]
    return (
        f"{manifest['samples']} clips, {len(manifest['prompts'])} prompts, "
        f"{manifest['failures']} failures, {len(files)} files, "
        f"{sum(shard.bytes for shard in files) / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    command.run(main, addresses=("checkpoint", "output"))
