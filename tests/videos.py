"""Whole videos for tests."""

import numpy as np

from longlive_jax.data.video import VideoFile, frame_indices


def read_video(path, height, width, num_frames=None, fps=24, start=0):
    """uint8 [frame, height, width, 3] of the frames that show a video at `fps`."""
    with VideoFile(path, height, width) as video:
        indices = frame_indices(len(video), video.info.fps, num_frames, fps, start)
        return np.stack(list(video.pick(indices)))
