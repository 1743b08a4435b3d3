"""Sidecars of actions, and the recordings that become some."""

import json
import random

import numpy as np

from longlive_jax.data import sidecars
from longlive_jax.data.sidecars.importers import FORMATS, Options
from tests.fuzz import mutate
from tests.fuzz.kind import Kind


def _sidecar_seeds(folder):
    actions = sidecars.parse("w*3, a+yaw+3*2, still*2")
    paths = [folder / f"walk.actions.{end}" for end in ("npz", "jsonl")]
    for path in paths:
        sidecars.write(path, actions)
    return paths


def _read_sidecar(path):
    actions = sidecars.read(path)
    assert np.isfinite(actions.mouse).all() and len(actions.keyboard) == len(actions.mouse)


_RECORDINGS = {
    "gamefactory-1.json": {"actions": {
        "0": {}, "1": {"ws": 1, "ad": 2, "scs": 3, "pitch_delta": 0.1, "yaw_delta": -1, "yaw": 3.0},
        "2": {"ws": 2, "detection": True},
    }},
    "mind-1.json": {"mark_time": 1, "total_time": 2, "data": [
        {"ws": 0, "ad": 1, "actor_rpy": {"x": 0.0, "y": 1.5, "z": 179.0}},
        {"lr": 1, "actor_rpy": {"x": 0.0, "y": 1.5, "z": -179.0}},
    ]},
    "abot-1.json": {"total_frames": 2, "fps": 20, "frames": [
        {"keys": {"W": True, "I": False}, "frame_id": 0}, {"keys": {"J": True}, "frame_id": 1},
    ]},
    "vpt-1.jsonl": [
        {"mouse": {"dx": 2.0, "dy": -1.5, "buttons": [0], "newButtons": [0]},
         "keyboard": {"keys": ["key.keyboard.left.shift"]}, "isGuiOpen": False, "yaw": 2.5},
        {"mouse": {"dx": 0, "dy": 0, "buttons": []}, "keyboard": {"keys": []}, "isGuiOpen": True},
    ],
}  # fmt: skip


def _recording_seeds(folder):
    paths = [folder / name for name in (*_RECORDINGS, "fastvideo-1.npz", "fastvideo-2.npy")]
    for path, content in zip(paths, _RECORDINGS.values()):
        lines = content if isinstance(content, list) else [content]
        path.write_text("\n".join(map(json.dumps, lines)))
    np.savez(paths[-2], keyboard=np.eye(4), mouse=np.ones((4, 2)))
    np.save(paths[-1], np.eye(4))
    return paths


def _read_recording(path):
    """By the format that the name begins with."""
    module = FORMATS[path.name.partition("-")[0]]
    actions = module.read(path, Options(fps=20.0))
    assert np.isfinite(actions.mouse).all() and len(actions.keyboard) == len(actions.mouse)


def _line(draw: random.Random, data: bytes) -> bytes:
    """One of the objects changed, or lines left out, twice or swapped."""
    lines = data.split(b"\n")
    i = draw.randrange(len(lines))
    if draw.random() < 0.3:
        lines[i], lines[-1] = lines[-1], lines[draw.randrange(len(lines))]
    elif lines[i]:
        lines[i] = mutate.mutated_json(draw, lines[i])
    return b"\n".join(lines)


_JSON = ((".jsonl", _line), (".json", mutate.mutated_json))
KINDS = (
    Kind("sidecar", _sidecar_seeds, _read_sidecar, share=2, short=20, inner=_JSON),
    Kind("recording", _recording_seeds, _read_recording, share=2, short=25, inner=_JSON),
)
