"""Moving test pictures that show what they were asked for.

A prompt chooses the colours. A film's sun moves with the picture's number. A world has a place and
a heading: mountains turn with the heading, a beacon ahead grows when it is walked up to.
"""

import colorsys
import dataclasses
import hashlib

import numpy as np

BEACON = (255, 64, 160)  # a colour that no prompt's sky has


def palette(prompt: str) -> np.ndarray:
    """Sky above, sky at the horizon, sun, far hills, near hills: [5, 3], 0 to 255."""
    hue = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:2], "big") / 65536
    colours = [(0.60, 0.55, 0.42), (0.05, 0.45, 0.96), (0.12, 0.25, 1.0)]
    colours += [(0.66, 0.40, 0.36), (0.69, 0.50, 0.13)]
    rgb = [colorsys.hsv_to_rgb((h + hue) % 1, s, v) for h, s, v in colours]
    return 255 * np.asarray(rgb, np.float32)


def hills(x: np.ndarray, seed: float, rough: float) -> np.ndarray:
    """Height of a ridge, 0 to 1, at places x (radians; the sum of sines has period 2 pi)."""
    height = np.zeros_like(x)
    for k, (n, a) in enumerate([(2, 0.42), (3, 0.30), (7, 0.14 * rough), (13, 0.09 * rough),
                                (29, 0.035 * rough)]):  # fmt: skip
        height += a * np.sin(n * x + seed * (k + 1) * 1.7)
    return 0.5 + 0.5 * height


def landscape(colours, width, height, x, sun, level=0.62, ridges=3):
    """Sky, sun at `sun` (x and y, shares of the picture) and ridges at angles x `[ridge, width]`."""
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    share = np.clip(rows / level, 0, 1)[..., None] ** 1.5
    picture = colours[0] * (1 - share) + colours[1] * share
    picture = np.broadcast_to(picture, (height, width, 3)).copy()
    columns = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    distance = np.hypot((columns - sun[0]) * width / height, rows - sun[1])
    glow = np.exp(-((distance / 0.30) ** 2))[..., None] * 0.55
    disc = np.clip((0.075 - distance) * height / 1.5, 0, 1)[..., None]
    picture += (colours[2] - picture) * np.maximum(glow, disc)
    for k in range(ridges):
        depth = (k + 1) / ridges
        top = level + 0.05 + 0.15 * k - (0.30 - 0.06 * k) * hills(x[k], 1.3 + 2 * k, 0.4 + depth)
        mask = np.clip((rows - top[None, :]) * height / 1.2, 0, 1)[..., None]
        colour = (
            colours[1] * (1 - depth) ** 1.5 * 0.6 + colours[3] * (1 - depth) + colours[4] * depth
        )
        colour = np.minimum(colour, 255) * (1.06 - 0.25 * (rows - 0.5))[..., None]
        picture += (colour - picture) * mask
    return picture


@dataclasses.dataclass
class Film:
    width: int
    height: int
    shot: int = 0  # pictures since the cut

    def draw(self, colours: np.ndarray, keys=None) -> np.ndarray:
        t = self.shot / 24
        self.shot += 1
        base = np.linspace(0, 1.5, self.width, dtype=np.float32)
        x = np.stack([base + t * speed for speed in (0.02, 0.06, 0.16)])
        sun = (0.22 + 0.03 * t, 0.40 - 0.08 * np.sin(0.1 * t))
        return landscape(colours, self.width, self.height, x, sun).clip(0, 255).astype(np.uint8)


@dataclasses.dataclass
class World:
    width: int
    height: int
    x: float = 0.0
    y: float = 0.0
    heading: float = 0.0  # radians to the right of the beacon's direction at the start

    def draw(self, colours: np.ndarray, keys: tuple = ((), 0.0, 0.0)) -> np.ndarray:
        codes, dx, _ = keys
        self.heading += 0.004 * dx
        ahead = ("KeyW" in codes) - ("KeyS" in codes)
        aside = ("KeyD" in codes) - ("KeyA" in codes)
        sin, cos = np.sin(self.heading), np.cos(self.heading)
        self.x += 0.08 * (ahead * sin + aside * cos)
        self.y += 0.08 * (ahead * cos - aside * sin)
        self.y = min(self.y, 8.5)
        half = 0.7  # half the angle of view, radians
        angles = self.heading + np.linspace(-half, half, self.width, dtype=np.float32)
        sun = (0.5 + (0.45 - self.heading) / (2 * half), 0.26)
        picture = landscape(
            colours, self.width, self.height, angles[None].repeat(2, 0), sun, 0.46, 2
        )
        horizon = int(self.height * 0.56)
        rows = np.arange(horizon, self.height, dtype=np.float32)[:, None]
        depth = 0.5 * self.height / (rows - horizon + 2)
        side = depth * np.linspace(-half, half, self.width, dtype=np.float32)[None, :]
        east = self.x + depth * sin + side * cos
        north = self.y + depth * cos - side * sin
        line = (np.abs(east % 1 - 0.5) > 0.47) | (np.abs(north % 1 - 0.5) > 0.47)
        fade = np.exp(-depth / 9)[..., None] * line[..., None] * 0.5
        ground = colours[4] * 0.9 + (colours[3] - colours[4]) * np.exp(-6 / depth)[..., None] * 0.7
        picture[horizon:] = ground + (colours[1] - ground) * fade
        self._beacon(picture, half, horizon)
        return picture.clip(0, 255).astype(np.uint8)

    def _beacon(self, picture, half, horizon):
        away = np.hypot(-self.x, 10 - self.y)
        angle = np.arctan2(-self.x, 10 - self.y) - self.heading
        angle = (angle + np.pi) % (2 * np.pi) - np.pi
        size = self.height / max(away, 0.5)
        centre = (0.5 + angle / (2 * half)) * self.width
        left, right = int(max(centre - size * 0.09, 0)), int(min(centre + size * 0.09, self.width))
        foot = int(min(horizon + 0.5 * size, self.height))
        if left < right:
            picture[max(int(foot - 1.7 * size), 0) : foot, left:right] = BEACON
