from fractions import Fraction

import numpy as np
import pytest

from longlive_jax.data.timeline import Timeline, describe, frame_indices


def ticks(times, end, tick):
    return np.array([round(t / tick) for t in [*times, end]], np.int64)


@pytest.mark.parametrize("tick", [Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 600)])
@pytest.mark.parametrize("fps", [24, 25, 30, 48, Fraction(30000, 1001), Fraction(24000, 1001), 120])
def test_constant_rates_need_no_timeline(tick, fps):
    times = [k / Fraction(fps) for k in range(500)]
    described = describe(ticks(times, 500 / Fraction(fps), tick), tick, Fraction(fps))
    assert described == (fps, None)


def test_a_rate_that_the_header_gets_wrong_is_measured():
    tick = Fraction(1, 600)
    times = [Fraction(k, 48) for k in range(100)]
    for claimed in (Fraction(24), Fraction(10**6), None):
        fps, line = describe(ticks(times, Fraction(100, 48), tick), tick, claimed)
        assert line is None and abs(fps - 48) < 0.05


def test_clocks_that_tremble_have_a_constant_rate():
    rng = np.random.default_rng(0)
    tick, interval = Fraction(1, 90000), 3000
    times = np.arange(300) * interval + rng.integers(-300, 300, 300)
    times = np.append(times - times[0], 300 * interval)
    assert describe(times, tick, Fraction(30)) == (30, None)


@pytest.mark.parametrize("tick", [Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 24 * 25)])
def test_pictures_by_their_times(tick):
    rng = np.random.default_rng(0)
    for _ in range(50):
        # Each picture is shown for some 48ths of a second.
        holds = rng.integers(1, 9, 40)
        starts = np.cumsum([0, *holds])
        line = Timeline(ticks([Fraction(int(s), 48) for s in starts[:-1]],
                              Fraction(int(starts[-1]), 48), tick), tick)  # fmt: skip
        want = [np.searchsorted(starts, t, side="right") - 1 for t in range(0, starts[-1], 2)]
        assert line.shown(None, Fraction(24), 0).tolist() == want
        first = int(rng.integers(40))
        got = line.shown(10, Fraction(24), first)
        want = [min(39, np.searchsorted(starts, starts[first] + 2 * k, side="right") - 1)
                for k in range(10)]  # fmt: skip
        assert got.tolist() == want


def test_only_the_last_picture_is_longer():
    tick = Fraction(1, 600)
    times = [Fraction(k, 30) for k in range(30)]
    fps, line = describe(ticks(times, 3, tick), tick, Fraction(30))
    assert fps == 30 and line is not None and line.even and line.seconds == 3


def test_halves_round_to_even():
    assert frame_indices(20, 60, 6, 24).tolist() == [0, 2, 5, 8, 10, 12]
