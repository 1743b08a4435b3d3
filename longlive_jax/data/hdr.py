"""Pictures of high dynamic range (PQ, HLG) as the ones that a BT.709 screen shows.

Light is relative to reference white, 203 cd/m2 (ITU-R BT.2408): up to `_KNEE` of it a picture keeps
its light, what is brighter is rolled off, hue kept. Colours outside of BT.709 are clipped.
"""

import functools

import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc

NAMES = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_WHITE = 203.0  # cd/m2, BT.2408
_KNEE = 0.8  # reference white itself then comes out as 246 of 255
_HLG_PEAK, _HLG_GAMMA = 1000.0, 1.2  # cd/m2 of BT.2100's reference screen, and its system gamma
_BLOCK = 1 << 15  # pixels
_GAMMA = 2.4  # of the screen that BT.709 is shown on: BT.1886
# Chromaticities (x, y) of red, green and blue; all have the white of D65.
_BT709 = (0.640, 0.330), (0.300, 0.600), (0.150, 0.060)
_BT2020 = (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)
_P3 = (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)
_PRIMARIES = {
    int(ColorPrimaries.BT709): _BT709,
    int(ColorPrimaries.SMPTE432): _P3,
}  # others: BT.2020
_D65 = (0.3127, 0.3290)


def to_bt709(codes: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Codes of a picture to those of BT.709.

    Args:
      codes: uint16 [height, width, 3], RGB by the picture's transfer function; 65535 is 1.
      transfer: a key of NAMES.
      primaries: FFmpeg's number; unknown ones are taken for BT.2020's, as HDR has them.

    Returns:
      uint8 [height, width, 3].
    """
    from_rgb = _to_xyz(_PRIMARIES.get(int(primaries), _BT2020))
    to_709 = np.linalg.solve(_to_xyz(_BT709), from_rgb).T.astype(np.float32)
    rows = max(1, _BLOCK // codes.shape[1])  # at once: what is between them stays in the cache
    out = np.empty(codes.shape, np.uint8)
    for start in range(0, len(codes), rows):
        block = slice(start, start + rows)
        light = _light(transfer)[codes[block]]
        if transfer == ColorTrc.ARIB_STD_B67:
            light = _shown(light, from_rgb[1].astype(np.float32))
        # By its root: dark colours are as far apart in the table as their codes.
        root = np.sqrt(_rolled_off(np.maximum(light @ to_709, 0)))
        out[block] = _codes()[np.rint(root * 65535).astype(np.uint16)]
    return out


def _shown(light: np.ndarray, luminance: np.ndarray) -> np.ndarray:
    """HLG's light at the camera to light of the screen; `luminance`: of each primary, [3]."""
    gain = (light @ luminance) ** np.float32(_HLG_GAMMA - 1) * np.float32(_HLG_PEAK / _WHITE)
    return light * gain[..., None]


def _rolled_off(light: np.ndarray) -> np.ndarray:
    """Light from 0 on to light from 0 to 1, of the same hue."""
    brightest, knee, rest = light.max(axis=-1), np.float32(_KNEE), np.float32(1 - _KNEE)
    if not (brightest > knee).any():
        return light
    brightest = np.maximum(brightest, knee)  # where the factor is 1
    return light * ((1 - rest * np.exp((knee - brightest) / rest)) / brightest)[..., None]


@functools.cache
def _light(transfer: int) -> np.ndarray:
    """float32 [65536]: of PQ (SMPTE ST 2084) light, 1 is reference white; of HLG (BT.2100) light at
    the camera, from 0 to 1.
    """
    signal = np.arange(65536) / 65535
    if transfer == ColorTrc.SMPTE2084:
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        root = signal ** (1 / m2)
        light = 10000 / _WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    else:
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return light.astype(np.float32)


@functools.cache
def _codes() -> np.ndarray:
    """uint8 [65536]: BT.709's code of light by its square root."""
    return np.rint(255 * (np.arange(65536) / 65535) ** (2 / _GAMMA)).astype(np.uint8)


@functools.cache
def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """float64 [3, 3]: linear RGB to XYZ, white to D65 with luminance 1."""

    def xyz(point):
        x, y = point
        return np.array([x / y, 1, (1 - x - y) / y])

    columns = np.stack([xyz(point) for point in primaries], axis=1)
    return columns * np.linalg.solve(columns, xyz(_D65))
