"""The summary of graded walks, and its table."""

from collections.abc import Iterable, Sequence
from typing import Any

from longlive_jax.config import FRAMES_PER_SECOND

FORMAT, VERSION = "longlive_jax grade of walks", 1  # of grade.json
POINTS = 48  # of a line of the plot
JUDGED = ("turn", "straight", "move", "wall")
_RETURNED = ("same", "psnr", "ssim")
COMPARED = ("view", "place", "view_known", "place_known")


def summarise(videos: Sequence[dict[str, Any]], window: float | None = None) -> dict[str, Any]:
    """Shares and means over all seconds of all videos, of records of `video.grade`.

    `grade`: the mean of the shares of seconds in which turns and moves are right.

    window: seconds that a model sees of its past; returns from within and from beyond are then
      apart.
    """
    seconds = [second for video in videos for second in video["seconds"]]
    returns = [found for video in videos for found in video["returns"]]
    minutes = sorted({second["second"] // 60 for second in seconds})
    return {
        "videos": len(videos),
        **_of(seconds),
        **_returns(returns),
        "by_window": _by_window(returns, window),
        "by_minute": [
            {"minute": minute, **_of([s for s in seconds if s["second"] // 60 == minute])}
            for minute in minutes
        ],
        "by_view": {
            view: _of([s for v in videos if v["view"] == view for s in v["seconds"]])
            for view in sorted({video["view"] for video in videos})
        },
    }


def _returns(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = {f"return_{name}": _mean(one[name] for one in found) for name in _RETURNED}
    return {"returns": len(found), **means}


def _by_window(found, window: float | None) -> dict[str, Any] | None:
    """Returns of who was gone for at most `window` seconds, and of who was gone for longer."""
    if window is None:
        return None
    most = window * FRAMES_PER_SECOND
    return {
        "seconds": window,
        "within": _returns([one for one in found if one["gone"] <= most]),
        "beyond": _returns([one for one in found if one["gone"] > most]),
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
        lines.append(f"returns to the start: {_told(summary)}")
        if apart := summary["by_window"]:
            for name in ("within", "beyond"):
                lines.append(f"  {name} {apart['seconds']:g} s: {_told(apart[name])}")
    return "\n".join(lines)


def compared(names: Sequence[str], summaries: Sequence[dict[str, Any]]) -> str:
    """What two folders of the same walks differ in, a line each: returns above all."""
    first, second = summaries
    rows: list[tuple[str, Any, Any]] = [
        ("grade", first["grade"], second["grade"]),
        ("returns the same", first["return_same"], second["return_same"]),
    ]
    for name in ("within", "beyond") if first["by_window"] and second["by_window"] else ():
        ours, theirs = (one["by_window"][name]["return_same"] for one in summaries)
        rows.append((f"  {name} {first['by_window']['seconds']:g} s", ours, theirs))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{names[0]} against {names[1]}:"]
    for name, ours, theirs in rows:
        change = "-"
        if ours is not None and theirs is not None:
            change = f"{100 * (ours - theirs):+.1f}"
        lines.append(f"  {name.ljust(width)}  {_share(ours)}  {_share(theirs)}  {change}")
    return "\n".join(lines)


def _told(found: dict[str, Any]) -> str:
    return (
        f"{found['returns']}, the same {_share(found['return_same'])}, PSNR "
        f"{_number(found['return_psnr'], 1)} dB, SSIM {_number(found['return_ssim'], 3)}"
    )


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
