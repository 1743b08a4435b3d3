"""A small text encoder to begin with: random weights, and a tokenizer of the captions' words.

    python -m launch.make_text_encoder --config=configs/train_ar_tiny_world.py \\
        --captions=tiny_world/caption --output=CKPT

Adds the parts "umt5" and the tokenizer to the checkpoint, for a run that trains it along with the
transformer (train.text_encoder) or leaves it as it is.
"""

import json
import pathlib
import tempfile

import jax
from absl import flags

from launch import command
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import store
from longlive_jax.errors import InputError
from longlive_jax.files.names import entries
from longlive_jax.models import tokenizer, umt5

FLAGS = flags.FLAGS
flags.DEFINE_string("captions", None, "Folder of .json files with a caption, at any depth.")
flags.DEFINE_string("output", None, "The checkpoint to make, or to add to.")
flags.DEFINE_integer("seed", 0, "Of the weights.")


def main() -> None:
    cfg = command.config()
    if not FLAGS.output:
        raise InputError("--output is missing; give the checkpoint's directory")
    texts = _captions()
    texts.append(cfg.sample.scene_cut_prefix)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / tokenizer.FILE
        words = tokenizer.train_tiny(texts, cfg.umt5.vocab_size, file)
        spec = umt5.spec(cfg.umt5)
        params = params_lib.init(spec, jax.random.key(FLAGS.seed))
        summary = store.save_tree(FLAGS.output, "umt5", params, spec, section=cfg.umt5)
        store.save_tokenizer(FLAGS.output, file)
    _, mask = words(texts, cfg.model.text_len)
    print(
        f"umt5: {summary.parameters:,} random parameters, {words.vocab_size} tokens; captions have "
        f"up to {mask.sum(axis=1).max()} of model.text_len={cfg.model.text_len}",
        flush=True,
    )


def _json_files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for path in entries(folder) if folder.is_dir() else ():
        if path.is_dir():
            found += _json_files(path)
        elif path.suffix.lower() == ".json":
            found.append(path)
    return found


def _captions() -> list[str]:
    try:
        files = _json_files(pathlib.Path(FLAGS.captions)) if FLAGS.captions else []
        texts = [json.loads(file.read_text())["caption"] for file in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--captions={FLAGS.captions}: a file has no caption: {error}") from error
    if not texts:
        raise InputError(f"--captions={FLAGS.captions}: no .json files; give a caption folder")
    return texts


if __name__ == "__main__":
    command.run(main, addresses=("output",))
