"""What was held and moved in each picture of a video, as a file beside it.

actions    Actions: keys, mouse, rate and view of a video, which check themselves
keys       the names of keys
canonical  our own files, NAME.actions.npz and NAME.actions.jsonl beside NAME.mp4
"""

from longlive_jax.data.sidecars.actions import MAX_DEGREES, VIEWS, Actions
from longlive_jax.data.sidecars.canonical import beside, path_for, read, write

__all__ = ["MAX_DEGREES", "VIEWS", "Actions", "beside", "path_for", "read", "write"]
