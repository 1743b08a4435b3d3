"""Small clips, drawn here."""

import pathlib
import tempfile

import av
import numpy as np


def clip(frames, height=48, width=96, fps=24, colour=(200, 40, 40), options=None) -> bytes:
    """An mp4 of a bright square that moves to the right over a colour."""
    with (
        tempfile.TemporaryDirectory() as folder,
        av.open(f"{folder}/clip.mp4", "w", options=options or {}) as out,
    ):
        stream = out.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            picture = np.full((height, width, 3), colour, np.uint8)
            at = 2 * i % (width - 16)
            picture[16:32, at : at + 16] = 250
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
        out.close()
        return pathlib.Path(f"{folder}/clip.mp4").read_bytes()
