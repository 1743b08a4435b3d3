"""Videos of a model in training: a few prompts through the sampler, on the training mesh.

With train.eval_grade they are graded: the run keeps the best of its checkpoints by that.
"""

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.data.images import ContactSheet
from longlive_jax.data.video import VideoWriter
from longlive_jax.errors import InputError
from longlive_jax.files import versioned
from longlive_jax.files.atomic import remove_abandoned
from longlive_jax.files.names import as_bytes
from longlive_jax.files.remote import AnyPath
from longlive_jax.grading import summary
from longlive_jax.grading import video as grading
from longlive_jax.models import dit
from longlive_jax.models.vae_spec import check_mesh
from longlive_jax.prompts import embeddings, shots
from longlive_jax.prompts.walks import Walks
from longlive_jax.sampling import batches, decode, render, stream
from longlive_jax.sampling.session import Engine, Texts

MOST_VIDEOS = 4
MOST_GRADED = 16  # a grade of few videos is mostly chance
FOLDER = "evaluation"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The folder with the videos, and their grade, 0 to 1, if they are graded."""

    folder: AnyPath
    grade: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """What evaluations make videos of. videos: at most MOST_VIDEOS, or MOST_GRADED.

    batch: the videos, repeated to fill the mesh. texts: the prompts that they stand for.
    """

    videos: Sequence[shots.Video]
    batch: batches.Batch
    texts: Sequence[str]


def read_prompts(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> Prompts:
    """The first videos of data.eval_path, of train.eval_chunks chunks each.

    Raises:
      InputError: they cannot be read, image-to-video lacks an image, the mesh cannot decode, or
        they are to be graded and are not of the world; sidecars beside them that do not fit.
    """
    if not cfg.data.eval_path:
        raise InputError(
            f"config: train.eval_every={cfg.train.eval_every} needs data.eval_path, prompts in any "
            "form that launch.sample reads; or set train.eval_every=0"
        )
    videos = shots.read(
        cfg.data.eval_path,
        chunks=cfg.train.eval_chunks,
        chunk_frames=cfg.model.chunk_frames,
        scene_cut_prefix=cfg.sample.scene_cut_prefix,
    )[: MOST_GRADED if cfg.train.eval_grade else MOST_VIDEOS]
    if cfg.train.eval_grade:
        for one in videos:  # refuses prompts of another world, before any work
            _script(cfg, one)
    texts = embeddings.distinct(videos)
    videos = [embeddings.shorten(v, min(len(v.chunks) for v in videos)) for v in videos]
    replicas = cfg.mesh.data * cfg.mesh.fsdp
    count = math.ceil(len(videos) / replicas) * replicas
    repeated = [videos[i % len(videos)] for i in range(count)]
    made = batches.make(cfg, repeated, size=count)
    if len(made) > 1:
        raise InputError(
            f"{cfg.data.eval_path}: some videos begin with an image, or change their prompt, where "
            "others do not; evaluation makes all of them together: give prompts of one kind"
        )
    check_mesh(mesh, count, made[0].width)
    made[0].check_images()
    return Prompts(videos, _acting(cfg, made[0]), texts)


def _acting(cfg: config_lib.Config, batch: batches.Batch) -> batches.Batch:
    """The batch with actions, if the model has an action path: always the same ones."""
    if cfg.model.actions.kind == "none":
        return batch
    walks = Walks(cfg, cfg.data.eval_path, batch.videos)
    latents = batch.latent_frames(cfg.model)

    def of(video):
        rng = np.random.default_rng(zlib.crc32(as_bytes(video.name)))
        return walks.actions(video, latents, rng)

    return dataclasses.replace(batch, actions=[of(video) for video in batch.videos])


class Evaluator:
    """`evaluator(step, ema)` writes WORKDIR/evaluation/step-000050/NAME.mp4 and NAME.png.

    Every process calls it; the first one writes.

    Args:
      vae: parameters, whole on every device of the mesh: the decoder's and, where videos begin
        with images, the encoder's.
      embed: the EMA of all trained networks -> embeddings of the prompts.
    """

    def __init__(
        self,
        cfg: config_lib.Config,
        mesh: jax.sharding.Mesh,
        root: AnyPath,
        prompts: Prompts,
        vae: params_lib.Tree,
        embed: Callable[[params_lib.Tree], Texts],
    ):
        self._root, self._prompts, self._vae, self._embed = root / FOLDER, prompts, vae, embed
        self._batch, self._mesh = prompts.batch, mesh
        if self._batch.pictured:
            # On a device of each process: the result is wanted on the host of every one.
            here = mesh_lib.make_mesh(config_lib.Mesh(), mesh.local_devices)
            local = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), vae)
            self._batch = self._batch.with_images(cfg, local, here)
        sample = dataclasses.replace(cfg.sample, steps=cfg.train.eval_steps)
        self._cfg = dataclasses.replace(cfg, sample=sample)
        where = params_lib.shardings(dit.spec(cfg.model), mesh, mesh_lib.SAMPLING_RULES)
        self._cast = jax.jit(
            lambda tree: jax.tree.map(lambda w: w.astype(cfg.compute_dtype), tree),
            out_shardings=where,
        )
        self._collect = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def __call__(self, step: int, ema: params_lib.Tree) -> Evaluation:
        """Makes the videos, and grades them; every process gets the grade.

        Raises:
          NotFiniteError: a chunk is not finite; the videos up to it are there.
        """
        folder = self._root / f"step-{step:06d}"
        texts = self._embed(ema)
        decoder = decode.Decoder(self._cfg, self._vae, self._mesh)
        params = stream.sampler(self._cfg, self._mesh).prepare(self._cast(ema["dit"]))
        engine = Engine(self._cfg, self._mesh, params, decoder)
        chunks = render.render(engine, texts, self._batch)
        first = jax.process_index() == 0
        total = batches.frames(self._batch.latent_frames(self._cfg.model))
        kept: list[list[np.ndarray]] = [[] for _ in self._prompts.videos]
        with contextlib.ExitStack() as stack:
            outputs = []
            for one in self._prompts.videos if first else ():
                path = folder / f"{one.name}.mp4"
                remove_abandoned(path)
                remove_abandoned(path.with_suffix(".png"))
                writer = VideoWriter(path, *self._batch.pixels, frames=total)
                stack.enter_context(writer)
                outputs.append((writer, ContactSheet(), path.with_suffix(".png")))
            for chunk in chunks:
                chunk.check()  # on every process
                for piece in chunk.frames:
                    frames = np.asarray(self._collect(piece))
                    for row, (writer, sheet, _) in enumerate(outputs):
                        writer.write(frames[row])
                        sheet.add(frames[row])
                        if self._cfg.train.eval_grade:
                            kept[row].append(frames[row])
        for _, sheet, path in outputs:
            sheet.save(path)
        if not self._cfg.train.eval_grade:
            return Evaluation(folder, None)
        grade = self._grade(folder, [np.concatenate(parts) for parts in kept]) if first else 0.0
        if jax.process_count() > 1:
            grade = float(multihost_utils.broadcast_one_to_all(np.float32(grade)))
        return Evaluation(folder, grade)

    def _grade(self, folder: AnyPath, videos: Sequence[np.ndarray]) -> float:
        """Writes `folder`/grade.json, as launch.grade does; returns the grade."""
        records = [
            grading.grade(
                one.name,
                lambda start, stop, frames=frames: frames[start:stop],
                len(frames),
                _script(self._cfg, one),
                self._cfg.model.chunk_frames,
            )
            for one, frames in zip(self._prompts.videos, videos)
        ]
        total = summary.summarise(records)
        content = {"summary": total, "videos": records}
        versioned.write(folder / "grade.json", summary.FORMAT, summary.VERSION, content)
        return total["grade"]


def _script(cfg, one: shots.Video) -> list[grading.Line]:
    return grading.script_of(one.chunks, cfg.sample.scene_cut_prefix)
