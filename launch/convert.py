"""Weights of LongLive and Wan to our checkpoint, and back.

    python -m launch.convert --config=configs/sample_5b.py --output=CKPT \\
        --dit=model_bf16.pt --vae=Wan2.2_VAE.pth --umt5=models_t5_umt5-xxl-enc-bf16.pth \\
        --tokenizer=google/umt5-xxl/tokenizer.json
    python -m launch.convert --checkpoint=CKPT --to_safetensors=DIR

Sources are files, folders or hf://owner/name[/file]. Parts may be given one at a time, to the same
--output. Weights keep their dtype, and are streamed: memory does not grow with the model.
"""

import os
import time

import tqdm
from absl import flags

from launch import command
from longlive_jax.checkpoints import files, from_torch, layout, store, to_torch
from longlive_jax.checkpoints import parts as parts_lib
from longlive_jax.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_string("dit", None, "The transformer: .pt, .safetensors, a folder of them, or hf://.")
flags.DEFINE_string("vae", None, "The VAE (Wan2.2, or a LightVAE).")
flags.DEFINE_string("umt5", None, "The text encoder.")
flags.DEFINE_string("tokenizer", None, "The text encoder's tokenizer.json.")
flags.DEFINE_string("lora", None, "A LoRA to merge into --dit.")
flags.DEFINE_float("lora_alpha", None, "Its alpha; default the file's, else its rank (scale 1).")
flags.DEFINE_bool("use_ema", False, "Of a training checkpoint, take the moving average.")
flags.DEFINE_string("output", None, "The checkpoint to make, or to add these parts to.")
flags.DEFINE_string("to_safetensors", None, "Folder for --checkpoint's weights as safetensors.")
flags.DEFINE_string("checkpoint", None, "With --to_safetensors: the checkpoint to read.")


def main() -> None:
    sources = {p: FLAGS[p].value for p in parts_lib.PARTS if FLAGS[p].value}
    if FLAGS.to_safetensors:
        if sources or FLAGS.tokenizer or FLAGS.lora or FLAGS.output:
            raise InputError("--to_safetensors takes --checkpoint only; run conversions one by one")
        _export()
    elif FLAGS.checkpoint:
        raise InputError("--checkpoint needs --to_safetensors=DIR; to make one, give --output")
    else:
        _import(sources)


def _import(sources: dict[str, str]) -> None:
    if not sources and not FLAGS.tokenizer:
        raise InputError("nothing to convert; give at least one of --dit --vae --umt5 --tokenizer")
    if not FLAGS.output:
        raise InputError("--output is missing; give the checkpoint's directory")
    if "dit" not in sources:
        for name in ("lora", "lora_alpha", "use_ema"):
            if FLAGS[name].value:
                raise InputError(f"--{name} needs --dit, the weights it is about")
    if FLAGS.lora_alpha is not None and not FLAGS.lora:
        raise InputError("--lora_alpha needs --lora")
    config = command.config()
    # All are validated before the first is written.
    tokenizer = files.locate(FLAGS.tokenizer, "tokenizer") if FLAGS.tokenizer else None
    opened = {
        part: from_torch.open_part(
            part,
            source,
            config,
            **(
                dict(use_ema=FLAGS.use_ema, lora_source=FLAGS.lora, lora_alpha=FLAGS.lora_alpha)
                if part == "dit"
                else {}
            ),
        )
        for part, source in sources.items()
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
                sources=source.files,
            )
        print(
            f"{part}: {bar.total} tensors, {summary.parameters:,} parameters, "
            f"{'/'.join(summary.dtypes)}, {summary.bytes / 2**20:,.1f} MiB, "
            f"{time.monotonic() - start:.1f} s",
            flush=True,
        )
    if tokenizer:
        store.save_tokenizer(FLAGS.output, tokenizer)
        print(f"tokenizer: {os.path.getsize(tokenizer) / 2**20:,.1f} MiB", flush=True)


def _export() -> None:
    if not FLAGS.checkpoint:
        raise InputError("--to_safetensors needs --checkpoint=CKPT")
    parts = [p for p in store.parts(FLAGS.checkpoint) if p in parts_lib.PARTS]
    try:
        os.makedirs(FLAGS.to_safetensors, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"--to_safetensors={FLAGS.to_safetensors}: {error.strerror}") from error
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
    command.run(main)
