"""Weights of LongLive and Wan to our checkpoint, and back.

    python -m launch.convert --config=configs/sample_5b.py --output=CKPT \\
        --dit=model_bf16.pt --vae=Wan2.2_VAE.pth --umt5=models_t5_umt5-xxl-enc-bf16.pth \\
        --tokenizer=google/umt5-xxl/tokenizer.json
    python -m launch.convert --checkpoint=CKPT --to_safetensors=DIR
    python -m launch.convert --config=configs/sample_5b.py --checkpoint=CKPT \\
        --recipe=nvfp4_w4a4 --output=SMALL_CKPT
    python -m launch.convert --config=configs/sample_5b.py --checkpoint=CKPT \\
        --lora=FILE_OR_RUN --output=STUDENT_CKPT

Sources are files, folders or hf://owner/name[@revision][/file]; of the latter the checkpoint's
metadata.json keeps the commit. Parts may be given one at a time, to the same --output. Weights keep
their dtype, and are streamed: memory does not grow with the model. With --recipe the transformer's
linear layers are quantised, to the bit as launch.sample would with --config.quant.recipe. --lora
may also be the folder of a training run, whose student's adapters are merged, and whose action path
replaces the checkpoint's. The original's
model_4o6.pt is already quantised, and needs no --recipe.
"""

import os
import time

import tqdm
from absl import flags

from launch import command
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import (
    from_torch,
    grown,
    layout,
    lora,
    peft,
    quantized,
    sources,
    store,
    to_torch,
    workdir,
)
from longlive_jax.checkpoints import parts as parts_lib
from longlive_jax.errors import InputError
from longlive_jax.files import folders
from longlive_jax.models import tokenizer as tokenizer_lib

FLAGS = flags.FLAGS
flags.DEFINE_string("dit", None, "The transformer: .pt, .safetensors, a folder of them, or hf://.")
flags.DEFINE_string("vae", None, "The VAE (Wan2.2, or a LightVAE).")
flags.DEFINE_string("umt5", None, "The text encoder.")
flags.DEFINE_string("tokenizer", None, "Its tokenizer.json, or spiece.model.")
flags.DEFINE_string("lora", None, "A LoRA, or a run that trains one, to merge in.")
flags.DEFINE_float("lora_alpha", None, "Its alpha; default the file's, else its rank (scale 1).")
flags.DEFINE_enum(
    "weights",
    "average",
    list(workdir.WEIGHTS),
    "Of --lora, a run: the average, or the last step's.",
)
flags.DEFINE_bool("use_ema", False, "Of a training checkpoint, take the moving average.")
flags.DEFINE_string("output", None, "The checkpoint to make, or to add these parts to.")
flags.DEFINE_string("to_safetensors", None, "Folder for --checkpoint's weights as safetensors.")
flags.DEFINE_string("recipe", None, "Quantise the transformer by this, of config.quant.recipe.")
flags.DEFINE_string("checkpoint", None, "The checkpoint to export, merge into or quantise.")


def main() -> None:
    given = {p: FLAGS[p].value for p in parts_lib.PARTS if FLAGS[p].value}
    if FLAGS.to_safetensors:
        if given or FLAGS.tokenizer or FLAGS.lora or FLAGS.output or FLAGS.recipe:
            raise InputError("--to_safetensors takes --checkpoint only; run conversions one by one")
        _export()
    elif FLAGS.checkpoint:
        if given or FLAGS.tokenizer:
            raise InputError("--checkpoint is another source; run conversions one by one")
        _remake()
    else:
        _import(given)


def _import(given: dict[str, str]) -> None:
    if not given and not FLAGS.tokenizer:
        raise InputError("nothing to convert; give at least one of --dit --vae --umt5 --tokenizer")
    if not FLAGS.output:
        raise InputError("--output is missing; give the checkpoint's directory")
    if "dit" not in given:
        for name in ("lora", "lora_alpha", "use_ema", "recipe"):
            if FLAGS[name].value:
                raise InputError(f"--{name} needs --dit, the weights it is about")
    if FLAGS.lora_alpha is not None and not FLAGS.lora:
        raise InputError("--lora_alpha needs --lora")
    config = command.config()
    options = dict(
        use_ema=FLAGS.use_ema,
        lora_source=FLAGS.lora,
        lora_alpha=FLAGS.lora_alpha,
        weights=FLAGS.weights,
        recipe=FLAGS.recipe,
    )
    # All are validated before the first is written.
    tokenizer = sources.locate(FLAGS.tokenizer, "tokenizer") if FLAGS.tokenizer else None
    opened = {
        part: from_torch.open_part(part, source, config, **(options if part == "dit" else {}))
        for part, source in given.items()
    }
    for part, source in opened.items():
        start = time.monotonic()
        with _bar(part, len(layout.torch_shapes(source.spec))) as bar:
            summary = store.save(
                FLAGS.output,
                part,
                source.pieces(bar.update),
                source.spec,
                section=source.section,
                sources=[file.origin for file in source.files],
                recipe=source.recipe,
            )
        _show(part, source.spec, summary, source.recipe, start)
    if tokenizer:
        store.save_tokenizer(FLAGS.output, tokenizer, tokenizer.origin)
        print(f"tokenizer: {os.path.getsize(tokenizer) / 2**20:,.1f} MiB", flush=True)


def _remake() -> None:
    """A checkpoint like --checkpoint, with a LoRA merged into the transformer, or quantised."""
    directory, output = FLAGS.checkpoint, FLAGS.output
    if not output:
        raise InputError(
            "--checkpoint needs --to_safetensors=DIR to export it, or --output=DIR with "
            "--recipe=NAME to quantise it, with --lora=FILE to merge that into it"
        )
    if FLAGS.lora_alpha is not None and not FLAGS.lora:
        raise InputError("--lora_alpha needs --lora")
    recipe = recipe_lib.get(FLAGS.recipe or "bf16")
    if recipe is None and not FLAGS.lora:
        names = ", ".join(name for name, r in recipe_lib.RECIPES.items() if r)
        raise InputError(f"--checkpoint with --output needs --recipe, one of {names}, or --lora")
    if workdir.is_run(directory):
        raise InputError(
            f"--checkpoint={directory}: is a training run's folder; make a checkpoint of it with "
            "launch.export first"
        )
    if os.path.realpath(output) == os.path.realpath(directory):
        raise InputError(f"--output={output}: is the checkpoint itself; give a new directory")
    command.check_apart([output], [], [directory])
    config = command.config()
    stored = store.Stored(directory, "dit")
    spec = parts_lib.PARTS["dit"].spec(config.model)
    stored.check(spec, config.model)
    quantized.spec(spec, recipe)  # refuses sides that its blocks do not divide
    start = time.monotonic()
    pieces = tqdm.tqdm(stored.pieces(), desc="dit", unit=" arrays", disable=None)
    files = list(stored.info["sources"])
    if FLAGS.lora:
        command.check_apart([output], [], [FLAGS.lora])
        adapters, file = peft.read(FLAGS.lora, FLAGS.weights, FLAGS.lora_alpha)
        merged = lora.merge(lora.placeholders(spec), adapters, FLAGS.lora_alpha, file)
        pieces = lora.merged_pieces(pieces, spec, merged)
        if workdir.is_run(FLAGS.lora):
            path = grown.path_of(FLAGS.lora, workdir.State(FLAGS.lora), FLAGS.weights)
            pieces = grown.replaced(pieces, path)
        files.append(file)
    summary = store.save(
        output,
        "dit",
        quantized.pieces(pieces, recipe, config.compute_dtype, directory),
        spec,
        section=config.model,
        sources=files,
        recipe=recipe,
    )
    _show("dit", spec, summary, recipe, start)
    for part in store.parts(directory):
        if part == tokenizer_lib.NAME:
            file, source = (
                os.path.join(directory, tokenizer_lib.FILE),
                store.sources(directory, part),
            )
            store.save_tokenizer(output, file, *source[:1])
        elif part != "dit":
            store.copy(store.Stored(directory, part), output)
            print(f"{part}: copied", flush=True)


def _show(part, spec, summary, recipe, start) -> None:
    print(
        f"{part}: {len(layout.torch_shapes(spec))} tensors, {summary.describe(recipe)}, "
        f"{time.monotonic() - start:.1f} s",
        flush=True,
    )


def _export() -> None:
    if not FLAGS.checkpoint:
        raise InputError("--to_safetensors needs --checkpoint=CKPT")
    command.check_apart([FLAGS.to_safetensors], [], [FLAGS.checkpoint])
    names = [name for name in store.parts(FLAGS.checkpoint) if name != tokenizer_lib.NAME]
    # The original has no files for networks of our own.
    parts = [name for name in names if to_torch.check(FLAGS.checkpoint, name).network]
    folders.make(FLAGS.to_safetensors, "--to_safetensors")
    for part in parts:
        start = time.monotonic()
        file = os.path.join(FLAGS.to_safetensors, f"{part}.safetensors")
        with _bar(part, None) as bar:
            count = to_torch.export_store(FLAGS.checkpoint, part, file, bar.update)
        size = os.path.getsize(file) / 2**20
        seconds = time.monotonic() - start
        print(f"{part}: {count} tensors, {size:,.1f} MiB, {seconds:.1f} s, {file}", flush=True)


def _bar(part: str, total: int | None) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, desc=part, unit=" tensors", disable=None)  # None: on a terminal


if __name__ == "__main__":
    command.run(main, addresses=("checkpoint", "output"))
