import pathlib

import numpy as np
import pytest
from PIL import Image

from longlive_jax.data.images import ContactSheet, contact_sheet, read_image, to_float
from longlive_jax.errors import InputError

ASSETS = pathlib.Path(__file__).parents[2] / "assets"


def quarters(height=40, width=60) -> np.ndarray:
    """Red, green over blue, white."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 255
    image[: height // 2, width // 2 :, 1] = 255
    image[height // 2 :, : width // 2, 2] = 255
    image[height // 2 :, width // 2 :] = 255
    return image


def test_to_float():
    values = to_float(np.array([0, 51, 255], np.uint8))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [-1, -0.6, 1], atol=1e-6)
    assert (np.round((to_float(np.arange(256, dtype=np.uint8)) + 1) * 127.5) == range(256)).all()
    with pytest.raises(InputError, match="uint8"):
        to_float(np.zeros(3, np.float32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = quarters()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: np.rot90(upright, 2),
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 40, 60), upright)


def test_stretches_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 96, 16)
    assert image.shape == (96, 16, 3) and image.dtype == np.uint8
    assert np.abs(image[:, 2:-2].astype(float) - 127.5).max() < 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_modes_become_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 200 * 256, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    pixels = read_image(path, 8, 8)
    assert pixels.shape == (8, 8, 3)
    if mode not in ("1", "P"):  # PIL dithers these
        assert np.abs(pixels.astype(int) - 200).max() <= 1


def test_transparent_is_black(tmp_path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 8, 8) == 0).all()


def test_unreadable_images(tmp_path):
    photo = (ASSETS / "photo.jpg").read_bytes()
    for name, data, message in [
        ("empty.png", b"", "the file is empty"),
        ("text.png", b"a red panda\n", "12 bytes that no image format starts with"),
        ("cut.jpg", photo[: len(photo) // 2], "cannot be read as an image"),
        ("cut.png", b"\x89PNG\r\n\x1a\n" + bytes(20), "image"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message) as raised:
            read_image(tmp_path / name, 8, 8)
        assert name in str(raised.value)
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "missing.png", 8, 8)
    with pytest.raises(InputError, match="folder"):
        read_image(tmp_path, 8, 8)


def test_asset():
    assert read_image(ASSETS / "photo.jpg", 64, 96).std() > 30


def test_contact_sheet_pixels(tmp_path):
    frames = [np.full((10, 20, 3), value, np.uint8) for value in (50, 100, 150, 200, 250)]
    contact_sheet(tmp_path / "a.png", frames, 3)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (22, 64, 3)
    for i, frame in enumerate(frames):
        y, x = i // 3 * 12, i % 3 * 22
        np.testing.assert_array_equal(sheet[y : y + 10, x : x + 20], frame)
    assert (sheet[10:12] == 0).all() and (sheet[12:, 44:] == 0).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_contact_sheet_labels(tmp_path):
    frames = np.full((2, 10, 40, 3), 90, np.uint8)
    contact_sheet(tmp_path / "a.png", frames, 4, ["shot 1", "a label\nthat is far too long"])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (24, 82, 3)
    np.testing.assert_array_equal(sheet[:10, 42:], frames[1])
    for x in (0, 42):
        assert sheet[10:, x : x + 40].max() > 150  # white letters
    assert (sheet[:, 40:42] == 0).all()  # that stay in their cell


def test_contact_sheet_refuses(tmp_path):
    frame = np.zeros((4, 4, 3), np.uint8)
    for frames, labels, message in [
        ([], None, "at least one frame"),
        ([frame, frame[:2]], None, "of one size"),
        ([frame.astype(np.float32)], None, "uint8"),
        ([frame], ["a", "b"], "2 labels for 1 frames"),
    ]:
        with pytest.raises(InputError, match=message):
            contact_sheet(tmp_path / "a.png", frames, 2, labels)
    with pytest.raises(InputError, match="columns=0"):
        contact_sheet(tmp_path / "a.png", [frame], 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunk", [1, 7, 32, 300])
def test_collector_is_bounded(tmp_path, chunk):
    count = 300
    frames = np.broadcast_to(
        (np.arange(count) % 256).astype(np.uint8)[:, None, None, None], (count, 8, 16, 3)
    )
    sheet = ContactSheet(every=4, max_cells=10, width=8)
    for start in range(0, count, chunk):
        sheet.add(frames[start : start + chunk])
        assert len(sheet._cells) <= 10
    assert sheet.frames_seen == count and sheet.every == 32
    assert [index for index, _ in sheet._cells] == list(range(0, count, 32))
    for index, cell in sheet._cells:
        assert cell.shape == (4, 8, 3) and (cell == index % 256).all() and cell.base is None
    sheet.save(tmp_path / "a.png", columns=5)
    assert Image.open(tmp_path / "a.png").size == (48, 2 * (4 + 14 + 2) - 2)
