"""What was held and moved in each picture of a video, as a file beside it.

Beside NAME.mp4 that is NAME.actions.npz or NAME.actions.jsonl:

  actions    Actions: keys, mouse, rate and view of a video, which check themselves
  keys       the names of keys
  canonical  the files
  strings    actions in a line of text, "w*48, yaw+3*24, still*10"
  resample   the same actions at another rate
  join       one video's after another's
  for_model  what a model reads of them
"""

from longlive_jax.data.sidecars.actions import MAX_DEGREES, VIEWS, Actions
from longlive_jax.data.sidecars.canonical import (
    beside,
    is_file,
    of_rows,
    path_for,
    read,
    rows,
    write,
)
from longlive_jax.data.sidecars.for_model import aligned, check_model, model_keys, vectors
from longlive_jax.data.sidecars.join import join
from longlive_jax.data.sidecars.resample import to_rate
from longlive_jax.data.sidecars.strings import parse

__all__ = [
    "MAX_DEGREES", "VIEWS", "Actions", "aligned", "beside", "check_model", "is_file", "join",
    "model_keys", "of_rows", "parse", "path_for", "read", "rows", "to_rate", "vectors", "write",
]  # fmt: skip
