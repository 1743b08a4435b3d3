"""The summary of graded videos, and its table."""

from collections.abc import Iterable, Sequence
from typing import Any

from longlive_jax.grading.verdict import ATTRIBUTES

FORMAT, VERSION = "longlive_jax grade", 1  # of grade.json
POINTS = 48  # of a line of the plot
SHARES = (*ATTRIBUTES, "all_right")


def summarise(videos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares and means over all chunks of all videos, of records of `video.grade`.

    `grade`, the one number by which checkpoints are compared: the mean of the shares of chunks
    whose objects, colours, sizes, backgrounds, places and motions are right.
    """
    chunks = [chunk for video in videos for chunk in video["chunks"]]
    cuts = [cut for video in videos for cut in video["cuts"]]
    measured = [cut for cut in cuts if cut["measured"]]
    returns = [found for video in videos for found in video["returns"]]
    minutes = sorted({int(chunk["second"] // 60) for chunk in chunks})
    return {
        "videos": len(videos),
        **_of(chunks),
        "cuts": len(cuts),
        "cut_latency_frames": _mean(cut["frames"] for cut in measured),
        "cut_latency_chunks": _mean(cut["chunks"] for cut in measured),
        "cuts_without_effect": sum(cut["frames"] is None for cut in measured),
        "right_within_a_chunk_after_a_cut": _mean(cut["right_within_a_chunk"] for cut in cuts),
        "returns": len(returns),
        "return_identity": _mean(found["identity"] for found in returns),
        "return_colour_distance": _mean(found["colour_distance"] for found in returns),
        "by_minute": [
            {"minute": minute, **_of([c for c in chunks if c["second"] // 60 == minute])}
            for minute in minutes
        ],
    }


def _of(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shares = {name: _mean(chunk["right"][name] for chunk in chunks) for name in ATTRIBUTES}
    return {
        "chunks": len(chunks),
        "grade": _mean(shares.values()),
        **shares,
        "all_right": _mean(chunk["all_right"] for chunk in chunks),
        "content_right": _mean(chunk["content_right"] for chunk in chunks),
        "sharpness": _mean(chunk["sharpness"] for chunk in chunks),
        "colour_error": _mean(chunk["colour_error"] for chunk in chunks),
        "background_error": _mean(chunk["background_error"] for chunk in chunks),
    }


def over_time(
    videos: Sequence[dict[str, Any]],
) -> tuple[list[float], dict[str, list[float | None]]]:
    """Seconds, and for each of SHARES and the sharpness what the chunks there have, in the mean.

    Of a long video neighbouring chunks are one point, so that there are at most POINTS.
    """
    longest = max((video["chunks"] for video in videos), key=len)
    each = -(-len(longest) // POINTS)
    starts = range(0, len(longest), each)
    points = [_of([c for v in videos for c in v["chunks"][i : i + each]]) for i in starts]
    lines = {name: [point[name] for point in points] for name in (*SHARES, "sharpness")}
    return [longest[i]["second"] for i in starts], lines


def table(summary: dict[str, Any]) -> str:
    """The summary as lines to print: one of all, one a minute where there are several."""
    names = ("grade", *SHARES, "sharpness")
    rows = [("", *names), ("all", *(_share(summary[name]) for name in names))]
    if len(summary["by_minute"]) > 1:
        for part in summary["by_minute"]:
            rows.append((f"minute {part['minute'] + 1}", *(_share(part[name]) for name in names)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths)) for row in rows]
    frames, chunks = summary["cut_latency_frames"], summary["cut_latency_chunks"]
    if summary["cuts"]:
        late = "not seen" if frames is None else f"after {frames:.1f} frames ({chunks:.2f} chunks)"
        lines.append(
            f"cuts: {summary['cuts']}, in effect {late}, {summary['cuts_without_effect']} never; "
            f"right within a chunk {_share(summary['right_within_a_chunk_after_a_cut'])}"
        )
    if summary["returns"]:
        lines.append(
            f"returns: {summary['returns']}, the same {_share(summary['return_identity'])}"
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
