"""Prompts into embeddings, for `launch.sample --prompt_embeds`.

    python -m launch.embed --config=configs/sample_5b.py --checkpoint=CKPT \\
        --prompts=FILE|IDS.npz --output=E.npz

Of prompts: ctx [chunk, token, dim], neg [1, token, dim] and cut [chunk]; several videos are
numbered: E-000.npz, E-001.npz, ... Of IDS.npz, with ids and mask [prompt, token]: ctx [prompt,
token, dim], rows past a prompt's length zero.
"""

import numpy as np
from absl import flags

from launch import command
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import networks
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npz, save_npz
from longlive_jax.models import umt5
from longlive_jax.pipeline import Pipeline
from longlive_jax.prompts import embeddings

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert.")
flags.DEFINE_string(
    "prompts", None, "A .txt or .json file, a folder of captions, or an .npz of ids."
)
flags.DEFINE_string("output", None, "The .npz to write.")
flags.DEFINE_integer("chunks_per_shot", 0, "Of captions without durations.", lower_bound=0)


def main() -> None:
    cfg = command.config()
    if not FLAGS.prompts:
        raise InputError(
            "--prompts is missing; give a file or folder of prompts, or an .npz of ids"
        )
    command.check_output("output", ".npz")
    mesh, read = mesh_lib.make_mesh(cfg.mesh), networks.folders(FLAGS.checkpoint)
    if FLAGS.prompts.endswith(".npz"):
        command.check_apart([FLAGS.output], [FLAGS.prompts], read)
        save_npz(FLAGS.output, ctx=_embed_ids(cfg, mesh).astype(np.float32))
        return
    pipeline = Pipeline(FLAGS.checkpoint, cfg, mesh)
    videos = pipeline.videos(FLAGS.prompts, chunks_per_shot=FLAGS.chunks_per_shot)
    count = len(videos)
    paths = [command.numbered(FLAGS.output, i, count) for i in range(count)]
    command.check_apart(paths, [FLAGS.prompts], read)
    texts = pipeline.embed(embeddings.distinct(videos), guided=True)
    negative = texts.negative[None].astype(np.float32)
    for path, video in zip(paths, videos):
        rows = texts([chunk.prompt for chunk in video.chunks]).astype(np.float32)
        save_npz(path, ctx=rows, neg=negative, cut=np.asarray([c.cut for c in video.chunks]))


def _embed_ids(cfg, mesh):
    arrays = load_npz(FLAGS.prompts, ("ids", "mask"), ())
    ids, mask = arrays["ids"], arrays["mask"]
    if ids.ndim != 2 or ids.shape != mask.shape or ids.dtype.kind not in "iu" or not ids.size:
        raise InputError(
            f"--prompts: ids {ids.dtype}{list(ids.shape)} and mask {list(mask.shape)} must both be "
            "integers [prompt, token]"
        )
    params = networks.load(FLAGS.checkpoint, "umt5", cfg, mesh)
    return umt5.encode_prompts(params, cfg.umt5, ids, mask, ids.shape[1], cfg.compute_dtype)


if __name__ == "__main__":
    command.run(main, addresses=("checkpoint", "output"))
