"""The summary of graded walks, and its table."""

from collections.abc import Iterable, Sequence
from typing import Any

FORMAT, VERSION = "longlive_jax grade of walks", 1  # of grade.json
POINTS = 48  # of a line of the plot
JUDGED = ("turn", "straight", "move", "wall")
COMPARED = ("view", "place", "view_known", "place_known")


def summarise(videos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares and means over all seconds of all videos, of records of `video.grade`.

    `grade`: the mean of the shares of seconds in which turns and moves are right.
    """
    seconds = [second for video in videos for second in video["seconds"]]
    returns = [found for video in videos for found in video["returns"]]
    minutes = sorted({second["second"] // 60 for second in seconds})
    return {
        "videos": len(videos),
        **_of(seconds),
        "returns": len(returns),
        "return_same": _mean(found["same"] for found in returns),
        "return_psnr": _mean(found["psnr"] for found in returns),
        "return_ssim": _mean(found["ssim"] for found in returns),
        "by_minute": [
            {"minute": minute, **_of([s for s in seconds if s["second"] // 60 == minute])}
            for minute in minutes
        ],
        "by_view": {
            view: _of([s for v in videos if v["view"] == view for s in v["seconds"]])
            for view in sorted({video["view"] for video in videos})
        },
    }


def _of(seconds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shares = {name: _mean(second["right"][name] for second in seconds) for name in JUDGED}
    turns = [second for second in seconds if second["right"]["turn"] is not None]
    return {
        "seconds": len(seconds),
        "grade": _mean((shares["turn"], shares["move"])),
        **shares,
        **{name: _mean(second.get(name) for second in seconds) for name in COMPARED},
        "turns": len(turns),
        "yaw_ratio": _middle(second["yaw"] / second["asked_yaw"] for second in turns),
        "judged": _mean(any(x is not None for x in s["right"].values()) for s in seconds),
        "psnr": _mean(second.get("psnr") for second in seconds),
        "ssim": _mean(second.get("ssim") for second in seconds),
        "sharpness": _mean(second["sharpness"] for second in seconds),
        "contrast": _mean(second["contrast"] for second in seconds),
    }


def over_time(
    videos: Sequence[dict[str, Any]],
) -> tuple[list[float], dict[str, list[float | None]]]:
    """Seconds, and what there is right, sharp and alike then, in the mean over videos.

    Of a long video neighbouring seconds are one point, so that there are at most POINTS.
    """
    longest = max(len(video["seconds"]) for video in videos)
    each = max(1, -(-longest // POINTS))
    starts = range(0, longest, each)
    points = [_of([s for v in videos for s in v["seconds"][i : i + each]]) for i in starts]
    lines = {name: [point[name] for point in points] for name in (*JUDGED, *COMPARED[:2], "ssim")}
    lines = {name: line for name, line in lines.items() if any(x is not None for x in line)}
    return [float(i) for i in starts], lines | {"sharpness": [p["sharpness"] for p in points]}


def table(summary: dict[str, Any]) -> str:
    """The summary as lines to print: of all, of each view and minute where there are several."""
    shares = ("grade", *JUDGED, *COMPARED[:2], "judged", "sharpness")
    numbers = {"yaw_ratio": 2, "psnr": 1, "ssim": 3, "contrast": 1}

    def row(name: str, part: dict[str, Any]) -> tuple[str, ...]:
        values = (_number(part[n], digits) for n, digits in numbers.items())
        return (name, str(part["seconds"]), *(_share(part[n]) for n in shares), *values)

    rows = [("", "seconds", *shares, *numbers), row("all", summary)]
    if len(summary["by_view"]) > 1:
        rows += [row(view, part) for view, part in summary["by_view"].items()]
    if len(summary["by_minute"]) > 1:
        rows += [row(f"minute {part['minute'] + 1}", part) for part in summary["by_minute"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths)) for row in rows]
    if summary["view_known"] is not None:
        lines.append(
            f"the true pictures show their view in {_share(summary['view_known'])} and their place "
            f"in {_share(summary['place_known'])} of the seconds; the others are not judged"
        )
    if summary["returns"]:
        lines.append(
            f"returns to the start: {summary['returns']}, the same "
            f"{_share(summary['return_same'])}, PSNR {_number(summary['return_psnr'], 1)} dB, SSIM "
            f"{_number(summary['return_ssim'], 3)}"
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def _middle(values: Iterable[float]) -> float | None:
    known = sorted(values)
    return round(known[len(known) // 2], 4) if known else None
