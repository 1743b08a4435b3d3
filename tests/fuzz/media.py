"""Videos and photographs."""

import random
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from longlive_jax.data import photographs
from longlive_jax.data.images import read_image
from longlive_jax.data.video_reader import VideoFile
from tests.fuzz import mutate
from tests.fuzz.kind import Kind

_HEIGHT, _WIDTH = 32, 48
_VIDEOS = {
    "mp4": ("libx264", "yuv420p"), "mkv": ("libx264", "yuv420p"), "webm": ("libvpx-vp9", "yuv420p"),
    "gif": ("gif", "rgb8"), "avi": ("mpeg4", "yuv420p"), "ts": ("mpeg2video", "yuv420p"),
    "mov": ("mjpeg", "yuvj420p"),
}  # fmt: skip
_FRAMES = 8


def _picture(i, height=_HEIGHT, width=_WIDTH):
    y, x = np.indices((height, width))
    return np.stack([(x * 5 + 20 * i) % 256, (y * 7) % 256, (x * y + i) % 256], -1).astype(np.uint8)


def _write_video(path, kind):
    codec, pixels = _VIDEOS[kind]
    options = {"fflags": "+bitexact"}  # no time of writing, no random numbers
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt = _HEIGHT, _WIDTH, pixels
        stream.codec_context.flags |= 1 << 23  # bit-exact: no name of the encoder
        stream.codec_context.thread_count = 1
        for i in range(_FRAMES):
            frame = av.VideoFrame.from_ndarray(_picture(i), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = i, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _video_seeds(kind):
    return lambda folder: [_write_video(folder / f"film.{kind}", kind)]


def _read_video(path):
    with VideoFile(path, _HEIGHT, _WIDTH) as video:
        indices = video.info.indices(fps=24)
        for _ in video.pick(dict.fromkeys(indices.tolist())):
            pass


def _boxes(draw: random.Random, data: bytes) -> bytes:
    """Boxes of an mp4, at some depth, left out, twice, swapped; or with another length or kind."""
    chunks = []
    at = 0
    while at + 8 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        if not 8 <= size <= len(data) - at:
            break
        chunks.append(data[at : at + size])
        at += size
    if not chunks:
        return data
    inner = [i for i, box in enumerate(chunks) if box[4:8] in _CONTAINERS]
    if inner and draw.random() < 0.8:
        i = draw.choice(inner)
        content = _boxes(draw, chunks[i][8:])
        chunks[i] = struct.pack(">I", 8 + len(content)) + chunks[i][4:8] + content
    elif draw.random() < 0.6:  # numbers of one box
        i = draw.randrange(len(chunks))
        body = bytearray(chunks[i])
        for _ in range(draw.choice((1, 1, 3))):
            if len(body) >= 12:
                place = draw.randrange(8, len(body) - 3)
                value = draw.choice(mutate.EXTREMES) & 0xFFFFFFFF
                body[place : place + 4] = struct.pack(">I", value)
        chunks[i] = bytes(body)
    else:
        chunks = mutate.mutated_chunks(draw, chunks)
    return b"".join(chunks) + data[at:]


_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"udta", b"edts", b"dinf")


def _elements(draw: random.Random, data: bytes) -> bytes:
    """An element of a Matroska file (its ID has four bytes) with another size, or moved."""
    ids = (b"\x15\x49\xa9\x66", b"\x16\x54\xae\x6b", b"\x1f\x43\xb6\x75", b"\x1c\x53\xbb\x6b",
           b"\x11\x4d\x9b\x74", b"\x18\x53\x80\x67", b"\x2a\xd7\xb1", b"\x44\x89", b"\xe7", b"\xb0",
           b"\xba", b"\xa3", b"\x23\xe3\x83")  # fmt: skip
    found = [data.find(i) + len(i) for i in ids if i in data]
    at = draw.choice(found)
    size = draw.choice((b"\x01" + b"\xff" * 7, b"\x01" + b"\0" * 7, b"\xff", b"\x80", b"\x88",
                        b"\x08\xff\xff\xff\xff", b"\x84\x7f\xff\xff\xff", draw.randbytes(8)))  # fmt: skip
    return data[:at] + size + data[at + draw.choice((len(size), 1, 0)) :]


# Photographs.

_IMAGES = {
    "png": ("PNG", {}), "jpg": ("JPEG", {}), "webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}), "lzw.tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "jpeg.tiff": ("TIFF", {"compression": "jpeg"}), "deflate.tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "ppm": ("PPM", {}), "bmp": ("BMP", {}), "gif": ("GIF", {}), "tga": ("TGA", {"compression": "tga_rle"}),
    "pcx": ("PCX", {}), "ico": ("ICO", {"sizes": [(16, 16)]}), "sgi": ("SGI", {}),
    "jp2": ("JPEG2000", {}), "avif": ("AVIF", {}), "dib": ("DIB", {}),
}  # fmt: skip
_OTHERS = ("bmp", "gif", "tga", "pcx", "ico", "sgi", "jp2", "avif", "dib", "qoi", "psd")


def _save(path, ending):
    name, options = _IMAGES[ending]
    image = Image.fromarray(_picture(0))
    if ending in ("png", "jpg", "webp", "tiff"):
        exif = Image.Exif()
        exif[274] = 6  # turned
        options = options | {"exif": exif, "icc_profile": _icc()}
    image.save(path, name, **options)
    return path


def _icc():
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the time when it was made
    return bytes(profile)


def _image_seeds(*endings):
    def seeds(folder):
        files = []
        for ending in endings:
            path = folder / f"photo.{ending}"
            if ending == "qoi":
                path.write_bytes(_qoi())
            elif ending == "psd":
                path.write_bytes(_psd())
            elif _IMAGES[ending][0] in photographs._formats():
                _save(path, ending)
            else:
                continue
            files.append(path)
        if "png" in endings:
            for mode in ("RGBA", "P", "L"):
                files.append(folder / f"{mode}.png")
                Image.fromarray(_picture(1)).convert(mode).save(files[-1])
            deep = np.linspace(0, 65535, _WIDTH * _HEIGHT).reshape(_HEIGHT, _WIDTH)
            files.append(folder / "gray16.png")
            Image.fromarray(deep.astype(np.uint16)).save(files[-1])
        if "ppm" in endings:
            files.append(folder / "deep.pgm")
            files[-1].write_bytes(b"P5 8 4 65535\n" + bytes(range(64)))
            files.append(folder / "plain.ppm")
            files[-1].write_bytes(b"P3\n# so\n2 2\n255\n" + b"1 2 3 " * 4)
        return files

    return seeds


def _qoi():
    body = b"\xfe\x10\x20\x30" + b"\xc0\x21" * 20
    return b"qoif" + struct.pack(">IIBB", 8, 4, 3, 0) + body + bytes(7) + b"\x01"


def _psd():
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 8, 8, 3)
    return head + bytes(12) + struct.pack(">H", 0) + bytes(range(96))


def _read_image(path):
    for fit in ("stretch", "pad"):
        read_image(path, 32, 64, fit)


def _png_chunks(draw: random.Random, data: bytes) -> bytes:
    """Chunks of a PNG changed, with right lengths and CRCs, or left out, twice, swapped."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if draw.random() < 0.3:
        order = mutate.mutated_chunks(draw, [bytes([i]) for i in range(len(chunks))])
        chunks = [chunks[i[0]] for i in order]
    else:
        i = draw.randrange(len(chunks))
        kind, body = chunks[i]
        if kind == b"IDAT" and draw.random() < 0.5:
            raw = zlib.decompress(body) if body else b""
            body = zlib.compress(mutate.mutated(draw, raw, [raw]) * draw.choice((1, 1, 100)))
        else:
            body = mutate.mutated(draw, body, [body])
        kind = draw.choice((kind, kind, kind, b"iTXt", b"zTXt", b"iCCP", b"tRNS", b"fcTL", b"acTL"))
        chunks[i] = kind, body
    out = data[:8]
    for kind, body in chunks:
        crc = zlib.crc32(kind + body)
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    return out


def _webp_chunks(draw: random.Random, data: bytes) -> bytes:
    chunks, at = [], 12
    while at + 8 <= len(data):
        size = struct.unpack("<I", data[at + 4 : at + 8])[0]
        chunks.append(data[at : at + 8 + size + size % 2])
        at += len(chunks[-1])
    body = b"WEBP" + b"".join(mutate.mutated_chunks(draw, chunks))
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tags(draw: random.Random, data: bytes) -> bytes:
    """Tags of a TIFF with another kind, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack(f"{order}I", data[4:8])
    (count,) = struct.unpack(f"{order}H", data[at : at + 2])
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        entry = at + 2 + 12 * draw.randrange(count)
        place, form = draw.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "H")))
        value = draw.choice((*mutate.EXTREMES, *range(10), 254, 257, 262, 277, 317, 339, 34675))
        value &= (1 << 8 * struct.calcsize(form)) - 1
        struct.pack_into(f"{order}{form}", out, entry + place, value)
    return bytes(out)


_NUMBERS = (b"0", b"-1", b"1", b"255", b"256", b"65535", b"65536", b"2147483648", b"99999999999",
            b"1e9", b"nan", b"inf", b"", b"#", b"\0", b"1" * 5000)  # fmt: skip


def _words(draw: random.Random, data: bytes) -> bytes:
    """Words of a PNM's head."""
    head, end = data[:24].split(), data[24:]
    head[draw.randrange(len(head))] = draw.choice(_NUMBERS)
    return b" ".join(head) + draw.choice((b"", b"\n")) + end


def _with_kinds():
    kinds = []
    for name, shares in {"mp4": (3, 14), "mkv": (2, 6), "webm": (2, 6), "gif": (1, 6),
                         "avi": (0.6, 3), "ts": (0.6, 3), "mov": (0.6, 3)}.items():  # fmt: skip
        inner = {"mp4": _boxes, "mov": _boxes, "mkv": _elements, "webm": _elements}.get(name)
        change = ((f".{name}", inner),) if inner else ()
        seeds = _video_seeds(name)
        kinds.append(Kind(f"video-{name}", seeds, _read_video, *shares, inner=change))
    for name, endings, shares, inner in (
        ("png", ("png",), (2, 12), ((".png", _png_chunks),)),
        ("jpeg", ("jpg",), (1, 6), ()),
        ("webp", ("webp",), (1, 6), ((".webp", _webp_chunks),)),
        ("tiff", ("tiff", "lzw.tiff", "jpeg.tiff", "deflate.tiff"), (2, 10), ((".tiff", _tags),)),
        ("ppm", ("ppm",), (1, 8), ((".ppm", _words), (".pgm", _words))),
        ("others", _OTHERS, (3, 14), ()),
    ):
        seeds = _image_seeds(*endings)
        kinds.append(Kind(f"image-{name}", seeds, _read_image, *shares, inner=inner))
    return tuple(kinds)


KINDS = _with_kinds()
