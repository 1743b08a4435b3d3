import numpy as np
import pytest

from longlive_jax.data.sidecars import strings
from longlive_jax.data.worlds.poses import Pose
from longlive_jax.errors import InputError
from longlive_jax.grading.walk import asked as lib
from longlive_jax.grading.walk import summary, truth
from longlive_jax.grading.walk.motion import Motion


def second(line):
    asked = lib.of_actions(strings.parse(f"still*1, {line}*48, still*1"))
    here = slice(25, 49)
    return lib.Asked(asked.yaw[here], asked.pitch[here], asked.velocity[here])


def motion(yaw=0.0, ahead=0.0, right=0.0, clear=0.8):
    values = (yaw, 0.0, ahead, right, clear)
    return Motion(*(np.full(24, value, np.float32) for value in values))


STANDS = lib.Asked(np.zeros(24), np.zeros(24), np.zeros((24, 2)))


@pytest.mark.parametrize(
    ("line", "seen", "name", "right"),
    [
        ("yaw+3", motion(yaw=3.5), "turn", True),
        ("yaw+3", motion(yaw=2.3), "turn", False),
        ("yaw+3", motion(yaw=-3), "turn", False),
        ("yaw+3", motion(yaw=-3, clear=0.1), "turn", None),
        ("w", motion(yaw=0.1, ahead=5), "straight", True),
        ("w", motion(yaw=0.5, ahead=5), "straight", False),
        ("w", motion(ahead=5), "move", True),
        ("w", motion(), "move", False),
        ("w", motion(ahead=-5), "move", False),
        ("s", motion(ahead=-5, right=2), "move", True),
        ("a", motion(right=-5), "move", True),
        ("d", motion(right=-5), "move", False),
        ("w+d", motion(ahead=3, right=3), "move", True),
        ("w+s", motion(), "move", True),
        ("still", motion(), "move", True),
        ("still", motion(ahead=5), "move", False),
        ("still", motion(ahead=5), "turn", None),
    ],
)
def test_a_second_does_what_is_asked(line, seen, name, right):
    for view in ("first", "third"):
        assert lib.judge(second(line), None, seen, view)["right"][name] is right


def test_a_wall_of_the_truth_stops_who_walks():
    through, stopped = (
        lib.judge(second("w"), STANDS, seen, "first") for seen in (motion(ahead=6), motion())
    )
    assert through["right"]["wall"] is False and stopped["right"]["wall"] is True
    assert through["right"]["move"] is None


def test_walking_takes_a_while_to_be_fast():
    velocity = lib.of_actions(strings.parse("w*97")).velocity
    assert np.isclose(velocity[0, 0], 0.78125) and np.isclose(velocity[-1, 0], 8.33, atol=0.01)
    # A turn does not turn what one has; a quarter of one later it is to the side.
    turned = lib.of_actions(strings.parse("w*96, yaw+15*6, still*2")).velocity
    assert turned[101, 1] < -4 and abs(turned[101, 0]) < 0.1


def test_another_rate_is_refused():
    with pytest.raises(InputError, match="fps=30"):
        lib.of_actions(strings.parse("w*9", fps=30))


def test_a_return_is_where_the_truth_comes_back():
    rng = np.random.default_rng(0)
    home, other = (rng.integers(0, 255, (64, 96, 3)).astype(np.uint8) for _ in range(2))
    way = [*range(0, 160, 10), *range(160, -1, -10)]
    for last, same in ((home, True), (other, False)):
        returns = truth.Returns()
        for number, x in enumerate(way):
            returns.see(number, last if number == len(way) - 1 else home, Pose(x, 0))
        (found,) = returns.records()
        assert found["frame"] == len(way) - 1 and found["same"] is same
        assert (found["psnr"] == 100) is same
        assert found["gone"] == len(way) - 1 - 2  # 24 units away one is still there
    never = truth.Returns()
    for number in range(9):
        never.see(number, home, Pose(0, 0))
    assert never.records() == []


def test_returns_from_within_the_window_and_from_beyond():
    """Of who was gone for two seconds at most, and for longer; a comparison by the same."""
    found = [
        {"gone": gone, "same": same, "psnr": 30.0, "ssim": 0.5}
        for gone, same in ((24, True), (48, True), (49, False), (200, True))
    ]
    video = {"name": "a", "frames": 1, "view": "first", "seconds": [], "returns": found}
    apart = summary.summarise([video], 2.0)["by_window"]
    assert [apart[k]["returns"] for k in ("within", "beyond")] == [2, 2]
    assert [apart[k]["return_same"] for k in ("within", "beyond")] == [1.0, 0.5]
    assert summary.summarise([video])["by_window"] is None
    none = video | {"returns": [one | {"same": False} for one in found]}
    lines = summary.compared(("a", "b"), [summary.summarise([v], 2.0) for v in (video, none)])
    assert lines.splitlines()[-1].split() == ["beyond", "2", "s", "50.0%", "0.0%", "+50.0"]
    table = summary.table(summary.summarise([video], 2.0)).splitlines()
    assert table[-1] == "  beyond 2 s: 2, the same 50.0%, PSNR 30.0 dB, SSIM 0.500"
