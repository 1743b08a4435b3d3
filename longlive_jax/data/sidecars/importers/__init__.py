"""Public recordings of games as our own sidecars.

  gamefactory  GF-Minecraft: metadata/NAME.json of video/NAME.mp4
  vpt          the contractors' data: NAME.jsonl beside NAME.mp4
  mind         NAME/action.json beside NAME/video.mp4
  abot         ABot-World: action.json
  fastvideo    FastVideo's arrays for Matrix-Game 2: .npz or .npy
  canonical    our own, for another rate (`ours`)

Each has `find`, the recordings of a folder or a file, and `read`, the actions of one.
"""

from types import ModuleType

from longlive_jax.data.sidecars.importers import (
    abot,
    fastvideo,
    gamefactory,
    mind,
    ours,
    vpt,
)
from longlive_jax.data.sidecars.importers.recording import Options, Recording

FORMATS: dict[str, ModuleType] = {
    "gamefactory": gamefactory, "vpt": vpt, "mind": mind, "abot": abot, "fastvideo": fastvideo,
    "canonical": ours,
}  # fmt: skip

__all__ = ["FORMATS", "Options", "Recording"]
