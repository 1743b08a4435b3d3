"""What every command imports; none of it starts a thread or a device."""

import av  # noqa: F401
import jax  # noqa: F401
from ml_collections import config_flags  # noqa: F401
from orbax.checkpoint import v1  # noqa: F401

from longlive_jax.checkpoints import from_torch, store, to_torch  # noqa: F401
from longlive_jax.models import dit, tokenizer, umt5, vae  # noqa: F401
from longlive_jax.prompts import pictures, shots  # noqa: F401
from longlive_jax.sampling import render  # noqa: F401
from longlive_jax.training import loop  # noqa: F401
