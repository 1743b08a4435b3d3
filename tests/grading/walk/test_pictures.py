import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from longlive_jax.grading.walk import pictures


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_psnr_and_ssim_by_their_definitions():
    a, b = noise((9, 10), 1).astype(float), noise((9, 10), 2).astype(float)
    assert np.isclose(pictures.psnr(a, b), 10 * np.log10(255**2 / ((a - b) ** 2).mean()), atol=1e-4)
    whole = np.pad(a, 3, "symmetric"), np.pad(b, 3, "symmetric")
    scores = []
    for i, j in np.ndindex(9, 10):
        x, y = (one[i : i + 7, j : j + 7] for one in whole)
        both = ((x - x.mean()) * (y - y.mean())).mean()
        scores.append(
            (2 * x.mean() * y.mean() + 6.5025) * (2 * both + 58.5225)
            / ((x.mean() ** 2 + y.mean() ** 2 + 6.5025) * (x.var() + y.var() + 58.5225))
        )  # fmt: skip
    assert np.isclose(pictures.ssim(a[None], b[None]), np.mean(scores), atol=1e-3)
    assert pictures.psnr(a, a) == 100 and np.isclose(pictures.ssim(a[None], a[None]), 1)


@given(st.integers(40, 90), st.integers(40, 120), st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_a_reduced_picture_has_the_means_of_its_parts(height, width, seed):
    frames = noise((1, height, width, 3), seed)
    small = pictures.small(frames)
    assert small.shape[:2] == (1, 40) and small.shape[3] == 3
    top = np.linspace(0, height, 41).astype(int)
    left = np.linspace(0, width, small.shape[2] + 1).astype(int)
    part = frames[0, top[3] : top[4], left[5] : left[6]].astype(float)
    np.testing.assert_allclose(small[0, 3, 5], part.mean((0, 1)), rtol=1e-5)


def test_a_blurred_picture_is_less_sharp():
    luma = ndimage.gaussian_filter(noise((2, 160, 256)).astype(np.float32), (0, 1, 1))
    blurred = ndimage.gaussian_filter(luma, (0, 3, 3))
    assert (pictures.sharpness(blurred) < 0.5 * pictures.sharpness(luma)).all()
    assert pictures.sharpness(np.zeros((1, 32, 32), np.float32)) == 0


@pytest.mark.parametrize("moved", [(0, 0), (2, -1), (-2, 2)])
def test_who_comes_back_a_little_aside_sees_the_same(moved):
    one = ndimage.gaussian_filter(noise((40, 64, 3)).astype(np.float32), (1, 1, 0))
    for view in ("first", "third"):
        known = pictures.scenery(one.shape, view)
        assert pictures.alike(one, np.roll(one, moved, (0, 1)), known) > 0.999
        assert pictures.alike(one, one[::-1], known) < 0.5


def test_who_walks_is_no_part_of_the_scenery():
    one, other = (noise((40, 64, 3), seed).astype(np.float32) for seed in (1, 2))
    other[pictures.box(other.shape)] = one[pictures.box(one.shape)]
    scores = [
        pictures.alike(one, other, pictures.scenery(one.shape, view)) for view in ("first", "third")
    ]
    assert scores[0] > 0.1 > abs(scores[1])
