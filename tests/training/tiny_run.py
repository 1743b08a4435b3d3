"""A training run as small as the architecture allows, and data for it."""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.data import records
from longlive_jax.data.manifest import write_manifest

SIZES = {
    "video.height": 32, "video.width": 64, "sample.vae_latents_per_call": 1,
    "model.chunk_frames": 2, "model.text_len": 8, "train.latent_frames": 4,
    "train.batch_size": 4, "train.accumulation": 2, "train.steps": 8, "train.save_every": 2,
    "train.learning_rate": 0.01, "train.ema_start": 2, "train.ema_decay": 0.5,
    "data.cached": True, "data.workers": 0,
}  # fmt: skip
LATENTS, TEXT = (4, 2, 4, 4), (8, 32)  # of a sample, of a prompt
NAMES = [f"clip-{i}" for i in range(7)]
# A run of launch.train on `write_cached`'s data, made before a run could have several networks.
RUN_BEFORE = pathlib.Path(__file__).parent / "run_before"
BEFORE = {
    "model__dim": 16, "model__ffn_dim": 16, "model__num_heads": 2, "model__num_layers": 1,
    "model__freq_dim": 16, "train__steps": 3, "train__save_every": 3,
    "train__error_recycling__enabled": True, "train__error_recycling__buckets": 2,
    "train__error_recycling__slots": 1,
}  # fmt: skip


def config(**overrides) -> config_lib.Config:
    """configs/tiny.py with SIZES; overrides by name, with __ for the dots."""
    from configs import tiny

    values = tiny.get_config()
    values.update_from_flattened_dict(SIZES)
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config_lib.from_config_dict(values)


def flags(data: pathlib.Path, workdir: pathlib.Path, **overrides) -> list[str]:
    """The same as flags of launch.train."""
    values = SIZES | {k.replace("__", "."): v for k, v in overrides.items()}
    return [
        "--config=configs/tiny.py", f"--config.data.path={data}", f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]  # fmt: skip


def rows_of(name: str) -> np.ndarray:
    """The actions of a sample that `write_cached` writes: four keys, and a mouse in degrees."""
    draw = np.random.default_rng(sum(name.encode()))
    keys = draw.integers(0, 2, (1 + 4 * (LATENTS[0] - 1), 4))
    moves = draw.uniform(-9, 9, (len(keys), 2))
    return np.concatenate([keys, moves], axis=1).astype(np.float32)


def write_cached(
    folder: pathlib.Path, bad=(), names=NAMES, acts: config_lib.Actions | None = None
) -> pathlib.Path:
    """Cached data, as launch.encode_dataset writes it; latents of the names in `bad` are NaN.

    acts: of a model with an action path; None: without actions.
    """
    folder.mkdir(parents=True)
    draw, prompts = np.random.default_rng(0), ["a boat", "a cat"]

    def sample(i, name):
        # Something to learn: all chunks of a video are alike.
        latents = np.broadcast_to(draw.standard_normal(LATENTS[1:]), LATENTS).astype(np.float32)
        if name in bad:
            latents = np.full_like(latents, np.nan)
        fields = {"name": name, "prompts": [prompts[i % 2]] * 2, "chunks": 2}
        return records.pack(fields, latents)

    def text(prompt):
        rows = draw.standard_normal((3, TEXT[1])).astype(np.float32)
        return records.pack({"prompt": prompt}, rows)

    cfg = config()
    latents = records.write_shard(
        folder / "latents-00000.arrayrecord", (sample(i, n) for i, n in enumerate(names))
    )
    texts = records.write_shard(folder / "text-00000.arrayrecord", map(text, prompts))
    settings = {
        f"{s}.{k}": getattr(getattr(cfg, s), k)
        for s, names in {
            "model": ("chunk_frames", "in_dim", "text_len", "text_dim"),
            "video": ("height", "width"),
            "train": ("latent_frames",),
        }.items()
        for k in names
    }
    more = {}
    if acts is not None:
        settings |= records.action_settings(acts)
        packed = (records.pack({"name": n}, rows_of(n)) for n in names)
        more["actions"] = [records.write_shard(folder / "actions-00000.arrayrecord", packed)]
    write_manifest(
        folder, samples=len(names), dtype="float32", latent_shape=LATENTS, least_chunks=2,
        failures=0, prompts=prompts, settings=settings, latents=[latents], text=[texts],
        **more,
    )  # fmt: skip
    return folder


def lines(workdir: pathlib.Path) -> list[dict]:
    """Of metrics.jsonl, which must hold one a step."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return found


def numbers(workdir: pathlib.Path) -> list[tuple]:
    """Of each step, what must not depend on when a run was stopped."""
    names = ("step", "loss", "grad_norm", "samples", "error_by_level", "bad_steps")
    return [tuple(json.dumps(line[name]) for name in names) for line in lines(workdir)]


def replaced(cfg: config_lib.Config, **sections) -> config_lib.Config:
    """`replaced(cfg, train=dict(seed=1))`."""
    new = {k: dataclasses.replace(getattr(cfg, k), **v) for k, v in sections.items()}
    return dataclasses.replace(cfg, **new)


def equal(a, b) -> bool:
    """Whether two trees of arrays have the same bits."""
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.all(same)
