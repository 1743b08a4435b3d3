"""Tokenizers, prompts, captions and configs."""

import json
import os
import pathlib
import random
import shutil

from longlive_jax.models import tokenizer as tokenizer_lib
from longlive_jax.prompts import shots
from tests.fuzz import mutate
from tests.fuzz.kind import Kind

_FIXTURES = pathlib.Path(__file__).parents[1] / "models" / "fixtures"
_PROMPTS = [
    "a red boat on a lake",
    "Ein Boot, é ﬁ 日本語 \U0001f600 ​",
    "</s> <unk> <pad>",
    "a" * 999,
]


def _tokenizer_seeds(folder):
    path = folder / "tokenizer.json"
    tokenizer_lib.train_tiny(_PROMPTS[:2], 64, path)
    unigram = folder / "unigram.json"
    unigram.write_bytes(tokenizer_lib.as_json(_converted(folder)))
    return [path, unigram]


def _converted(folder):
    """A tokenizer.json of a unigram model, as UMT5's is."""
    place = folder / "converted.json"
    place.write_bytes(tokenizer_lib.as_json(_FIXTURES / "spiece.model"))
    return place


def _spiece_seeds(folder):
    names = ("spiece.model", "bytes.spiece.model")
    return [pathlib.Path(shutil.copy(_FIXTURES / name, folder / name)) for name in names]


def _read_tokenizer(path):
    tokenizer = tokenizer_lib.Tokenizer.from_file(path)
    return [array.tobytes() for array in tokenizer(_PROMPTS, 32)]


def _fields(draw: random.Random, data: bytes) -> bytes:
    """Fields of a protocol buffer left out, twice, swapped, or changed with right lengths."""
    chunks, at = [], 0
    while at < len(data):
        size, start, shift = 0, at + 1, 0
        if data[at] & 7 != 2:
            return mutate.mutated(draw, data, [data])
        while True:
            size |= (data[start] & 127) << shift
            start, shift = start + 1, shift + 7
            if data[start - 1] < 128:
                break
        chunks.append((data[at : at + 1], data[start : start + size]))
        at = start + size
    if draw.random() < 0.3:
        order = mutate.mutated_chunks(draw, [i.to_bytes(4) for i in range(len(chunks))])
        chunks = [chunks[int.from_bytes(i)] for i in order]
    else:
        i = draw.choice((draw.randrange(len(chunks)), len(chunks) - 1, len(chunks) - 2))
        chunks[i] = chunks[i][0], mutate.mutated(draw, chunks[i][1], [chunks[i][1]])
    return b"".join(tag + _varint(len(body)) + body for tag, body in chunks)


def _varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


# Prompts.


def _prompt_seeds(folder):
    (folder / "lines.txt").write_text("a red boat\n\nThe scene transitions. a cat\n")
    shot_list = [
        {"prompt": "a red boat", "chunks": 2, "image": "first.png"},
        {"prompt": "a cat", "seconds": 3.5, "cut": False},
        {"prompt": "The scene transitions. é"},
    ]
    (folder / "shots.json").write_text(json.dumps(shot_list))
    captions = folder / "captions"
    for name in ("one", "two"):
        (captions / name).mkdir(parents=True)
        for i in range(2):
            file = captions / name / f"{i:06d}.json"
            file.write_text(json.dumps({"caption": f"shot {i}"}))
    (captions / "one" / "shot_durations.txt").write_text("1, 3\n")
    pictures = folder / "pictures"
    for name, content in (("images/cat.png", "no picture"), ("prompts/cat.txt", "a cat\nit sits")):
        (pictures / name).parent.mkdir(parents=True)
        (pictures / name).write_text(content)
    return [folder / name for name in ("lines.txt", "shots.json", "captions", "pictures")]


def _read_prompts(path):
    image = path.with_name("first.png")
    if path.is_file():
        image.write_bytes(b"")
    found = shots.read(path, chunks=4, chunk_frames=8, scene_cut_prefix="The scene transitions. ")
    return [(video.name, len(video.chunks)) for video in found]


def _training_seeds(folder):
    from tests.fuzz.media import _write_video

    data = folder / "data"
    for name in ("one", "two"):
        for kind in ("video", "caption"):
            (data / kind / name).mkdir(parents=True)
        _write_video(data / "video" / name / "000000.mp4", "mp4")
        text = json.dumps({"caption": f"a red boat, {name}"})
        (data / "caption" / name / "000000.json").write_text(text)
    return [data]


def _read_training(path):
    import dataclasses

    from longlive_jax.data.clips import VideoFolder
    from tests.fuzz.weights import CONFIG

    data = dataclasses.replace(CONFIG.data, path=str(path), allow_padding=True)
    train = dataclasses.replace(CONFIG.train, latent_frames=2)
    cfg = dataclasses.replace(CONFIG, data=data, train=train)
    source = VideoFolder(cfg)
    for i in range(len(source)):
        json.dumps(source.sample(i, i).failures)


# Configs: a command's flags, a line each.


def _config_seeds(folder):
    settings = {
        "model.dim": 64, "model.num_heads": 8, "model.chunk_frames": 8, "video.height": 64,
        "video.shift": 5.0, "sample.steps": 4, "sample.guidance_scale": 3.0,
        "sample.rope_offset": 8.0, "sample.negative_prompt": "blurry", "train.seed": 0,
        "train.learning_rate": 1e-5, "train.weight_decay": 0.01, "data.allow_padding": True,
        "quant.recipe": "bf16", "mesh.fsdp": 1, "dtype": "float32", "vae.latent_mean": "0,0,0,0",
        "train.error_recycling.slots": 4, "sample.height": 64,
    }  # fmt: skip
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    path = folder / "flags.txt"
    path.write_text("\n".join(["--config=configs/tiny.py", *words]))
    return [path]


def _flags(draw: random.Random, data: bytes) -> bytes:
    words = data.decode().split("\n")
    for _ in range(draw.choice((1, 1, 2, 3))):
        i = draw.randrange(1, len(words))
        name, _, value = words[i].partition("=")
        match draw.randrange(5):
            case 0:
                other = draw.choice(words)
                words[i] = f"{name}={other.partition('=')[2]}"
            case 1:
                words[i] = draw.choice((name, f"{name}x={value}", f"{name}.x={value}",
                                        name.rpartition(".")[0] + f"={value}", f"--no{name[2:]}"))  # fmt: skip
            case 2:
                words.insert(i, words[i])
            case _:
                words[i] = f"{name}={draw.choice(_VALUES)}"
    return "\n".join(words).encode(errors="surrogateescape")


_VALUES = (
    "", "nan", "inf", "-inf", "1e400", "-1", "0", "1", "2", "3", "7", "2147483647", "2147483648",
    "1e9", "1e38", "9" * 5000, "True", "None", "[]", "{}", "()", "(1,2)", "1,2", "1,,2", "nan,0,0,0",
    "é", "\udcff", "'a'", "__import__('os')", "[" * 500, "0x10", "1_000", " 5 ", "-0.0", "1e-320",
)  # fmt: skip


def _read_config(path):
    """As a command does it; it ends the process with 2 for a refusal."""
    import sys

    from launch import command
    from longlive_jax import config as config_lib

    words = path.read_bytes().replace(b"\0", b"").split(b"\n")
    sys.argv = ["fuzz", *map(os.fsdecode, words)]

    def main():
        cfg = command.config()
        config_lib.to_config_dict(cfg)
        config_lib.validate_training(cfg)
        config_lib.validate_vae_training(cfg)

    command.run(main)


def _warm():
    import launch.command  # noqa: F401


_warm()
_JSON = ((".json", mutate.mutated_json),)

KINDS = (
    Kind("tokenizer", _tokenizer_seeds, _read_tokenizer, share=3, short=20, inner=_JSON),
    Kind("spiece", _spiece_seeds, _read_tokenizer, share=2, short=14,
         inner=((".model", _fields),)),
    Kind("prompts", _prompt_seeds, _read_prompts, share=2, short=25, inner=_JSON),
    Kind("training-data", _training_seeds, _read_training, short=6, inner=_JSON),
    Kind("config", _config_seeds, _read_config, share=1.5, short=12, apart=True,
         inner=((".txt", _flags),)),
)  # fmt: skip
