"""Decodes an uploaded picture or clip, in a process of its own with limits.

    python -m longlive_jax.serving.decoding SOURCE TARGET HEIGHT WIDTH FIT CHUNK LIMITS

The bytes are a stranger's, and decoders have had holes. The server reads only what this process
leaves: an .npy of uint8 [frame, HEIGHT, WIDTH, 3], and what it prints: "image" or "clip".
"""

import contextlib
import json
import os
import pathlib
import resource
import sys


def main(source, target, height, width, fit, chunk, limits) -> str:
    """Writes TARGET; returns "image" or "clip"."""
    numbers = json.loads(limits)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = int(numbers["decode_s"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (numbers["decode_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (numbers["decode_bytes"],) * 2)
    size = int(height), int(width)
    kind = sniff(pathlib.Path(source).read_bytes()[:64])
    if not kind:
        raise ValueError("neither an image nor a clip")
    read = _image if kind == "image" else _clip
    count, frames = read(source, *size, fit, int(chunk), numbers)
    from numpy.lib import format

    # Frame by frame: all of a clip in memory would need its limit alone.
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
    with open(target, "wb") as file:
        format.write_array_header_1_0(file, header)
        for frame in frames:
            file.write(frame.tobytes())
    return kind


def sniff(head: bytes) -> str:
    """ "image" or "clip" by the first bytes of a file, "" for what is not taken."""
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n":
        return "image"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image"
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] == b"avif" else "clip"
    return "clip" if head[:4] == b"\x1aE\xdf\xa3" else ""  # Matroska, WebM


def _image(source, height, width, fit, chunk, limits):
    del chunk
    import warnings

    from PIL import Image

    from longlive_jax.data.images import read_image
    from longlive_jax.errors import InputError

    with warnings.catch_warnings(), Image.open(source) as image:
        warnings.simplefilter("ignore")
        if image.width * image.height > limits["pixels"]:
            raise InputError(
                f"an image of {image.height}x{image.width} pixels; the limit is "
                f"{limits['pixels']} pixels: scale it down"
            )
    return 1, [read_image(source, height, width, fit)]


def _clip(source, height, width, fit, chunk, limits):
    """How many of the clip's last frames are whole chunks, and these."""
    del fit
    from longlive_jax.data.video_reader import VideoFile
    from longlive_jax.errors import InputError

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(VideoFile(source, height, width))
        if file.info.height * file.info.width > limits["pixels"]:
            raise InputError(f"the clip's frames have over {limits['pixels']} pixels: scale it")
        seconds = len(indices := file.info.indices(fps=limits["fps"])) / limits["fps"]
        if seconds > limits["clip_s"]:
            raise InputError(
                f"a clip of {seconds:.0f} s; the limit is {limits['clip_s']:g} s: cut it"
            )
        indices = indices[-limits["clip_frames"] :]
        count = (len(indices) + 3) // chunk * chunk - 3
        if count < 1:
            raise InputError(
                f"a clip of {len(indices)} frames at {limits['fps']} a second; it needs "
                f"{chunk - 3} or more"
            )
        kept = stack.pop_all()

    def frames():
        with kept:
            yield from file.pick(indices[-count:])

    return count, frames()


def command(source, target, size, fit, chunk, limits) -> list[str]:
    """The words that start this process. It does without JAX, which takes a second to import."""
    from longlive_jax.config import FRAMES_PER_SECOND

    names = ("decode_s", "decode_bytes", "pixels", "clip_frames", "clip_s")
    numbers = {name: getattr(limits, name) for name in names} | {"fps": FRAMES_PER_SECOND}
    return [sys.executable, "-m", "longlive_jax.serving.decoding", os.fspath(source),
            os.fspath(target), *map(str, size), fit, str(chunk), json.dumps(numbers)]  # fmt: skip


if __name__ == "__main__":
    try:
        print(main(*sys.argv[1:]))
    except Exception as problem:
        # A message of ours says what is wrong; it starts with the file's name on this server.
        text = str(problem).removeprefix(sys.argv[1]).lstrip(": ")
        ours = type(problem).__name__ == "InputError"
        print(text if ours else "it cannot be decoded", file=sys.stderr)
        sys.exit(2)
