"""Cuts of any footage, by PySceneDetect: whether they are where a script asks for them.

It knows nothing of the prompts: it sees that one picture is unlike the one before. So it serves
footage that no grader here can read.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longlive_jax.errors import InputError

FORMAT, VERSION = "longlive_jax cuts", 1  # of cuts.json
_SHORTEST = 8  # frames between two cuts: less is a flash


def detected(file: pathlib.Path) -> list[int]:
    """The frames that begin a new scene, by `ContentDetector` with its own threshold.

    Raises:
      InputError: PySceneDetect is not installed.
    """
    try:
        import scenedetect
    except ImportError as error:
        raise InputError(
            "--cuts=scenedetect needs PySceneDetect; pip install scenedetect-headless"
        ) from error
    detector = scenedetect.ContentDetector(min_scene_len=_SHORTEST)
    scenes = scenedetect.detect(str(file), detector, backend="pyav")
    return [start.frame_num for start, _ in scenes[1:]]


def compare(asked: Sequence[int], found: Iterable[int], within: int) -> dict[str, Any]:
    """Which asked cuts are there, and which found ones nobody asked for.

    Args:
      asked, found: first frames of scenes, ascending.
      within: frames after an asked cut in which it still counts, and belongs to no later one.

    Returns:
      {"cuts": [{"asked", "latency": frames or None}], "others": [frame]}
    """
    left, cuts = list(found), []
    for i, frame in enumerate(asked):
        stop = min([frame + within, *asked[i + 1 : i + 2]])
        hits = [f for f in left if frame <= f < stop]
        cuts.append({"asked": frame, "latency": hits[0] - frame if hits else None})
        left = [f for f in left if f not in hits[:1]]
    return {"cuts": cuts, "others": left}


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all videos: share of asked cuts that are there, their mean latency, others a video."""
    records = list(records)
    cuts = [cut for record in records for cut in record["cuts"]]
    there = [cut["latency"] for cut in cuts if cut["latency"] is not None]
    return {
        "videos": len(records),
        "asked": len(cuts),
        "confirmed": len(there) / len(cuts) if cuts else None,
        "mean_latency": sum(there) / len(there) if there else None,
        "others": sum(len(record["others"]) for record in records),
    }


def table(total: Mapping[str, Any]) -> str:
    """`summarise`, to print."""
    share, latency = total["confirmed"], total["mean_latency"]
    there = "none asked" if share is None else f"{100 * share:.1f} % of {total['asked']}"
    after = "" if latency is None else f", after {latency:.1f} frames in the mean"
    return f"{total['videos']} videos: cuts {there}{after}; {total['others']} others"
