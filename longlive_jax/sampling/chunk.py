"""A chunk of a stream: its frames are there before its clean pass has run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from longlive_jax.errors import NotFiniteError
from longlive_jax.models import vae
from longlive_jax.sampling import finite as finite_lib
from longlive_jax.sampling.controls import Applied
from longlive_jax.sampling.decode import Decoder, Pictures


@dataclasses.dataclass(frozen=True)
class Direction:
    """What a chunk is made under.

    prompts: of each row, as the model reads them; they stay until there are others.
    cut: whether each row starts a new shot with this chunk.
    recache: whether the visible past is brought under the prompts first.
    toward, weights: a blend: each row's text is (1 - weight) of its prompt's embedding and weight
      of this one's; both empty: the prompts alone.
    steps: of the solver; None: the config's.
    guidance: of each row; empty: the config's.
    """

    chunk: int
    prompts: tuple[str, ...]
    cut: tuple[bool, ...]
    recache: bool = False
    toward: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    steps: int | None = None
    guidance: tuple[float, ...] = ()

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Direction":
        """Of its fields, as JSON has them; what an older version did not write is the default."""
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list | tuple) else v for k, v in fields.items()
        }
        return cls(**given)

    @property
    def text(self) -> tuple[Any, ...]:
        """What the text of the chunk is a function of."""
        return self.prompts, self.toward, self.weights

    @property
    def lasting(self) -> tuple[Any, ...]:
        """What the next chunk is made under too, if nothing else is said."""
        return self.text, self.steps, self.guidance


class Making:
    """A chunk whose latents are dispatched; dispatches what is left of it, one piece at a time.

    JAX's dispatch waits for the device when much is queued, so that what is dispatched before a
    picture is asked for delays it. Hence: the VAE's next piece when it is asked for, and the clean
    pass when all pieces have been.

    Args:
      pieces: how many there will be.
      decoding: yields (state of the decoder, Pictures), dispatching each when it is asked for.
      finish: (state of the decoder) -> None: dispatches the clean pass, keeps what is carried.
    """

    def __init__(
        self,
        pieces: int,
        decoding: Iterator[tuple[vae.DecodeState, Pictures]],
        finish: Callable[[vae.DecodeState | None], None],
    ):
        self.count, self.pieces = pieces, []
        self._state, self._decoding = None, decoding
        self._finish: Callable | None = finish

    def piece(self, index: int) -> Pictures:
        """Piece `index`, not waited for."""
        while len(self.pieces) <= index:
            self._state, pictures = next(self._decoding)
            self.pieces.append(pictures)
        return self.pieces[index]

    def finish(self) -> None:
        """Dispatches all that is left, the clean pass at the end."""
        if self._finish is not None:
            if self.count:
                self.piece(self.count - 1)
            finish, state = self._finish, self._state
            self._finish = self._state = None
            self._decoding = iter(())
            finish(state)


class Frames(Sequence):
    """The frames of a chunk in pieces, each dispatched when it is asked for.

    Iterating to the end dispatches the chunk's clean pass behind the last piece.
    """

    def __init__(self, making: Making):
        self._making = making

    def __len__(self) -> int:
        return self._making.count

    def __getitem__(self, index):
        count = self._making.count
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(count)))
        if not -count <= index < count:
            raise IndexError(f"piece {index} of {count}")
        return self._making.piece(index % count).frames

    def __iter__(self) -> Iterator[jax.Array]:
        for pictures in self.pictures():
            yield pictures.frames

    def pictures(self) -> Iterator[Pictures]:
        """The pieces, each with whether its frames are finite."""
        for index in range(self._making.count):
            yield self._making.piece(index)
        self._making.finish()


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk of a stream; its arrays have not been waited for.

    frames: uint8 [row, frame, height, width, 3], in pieces as the VAE gives them; none without a
      decoder.
    latents: float32 [row, frame, h, w, channel].
    applied: what the chunk was made under.
    latents_finite: bool [], whether the latents are finite.
    largest: float32 [], the largest magnitude among the latents.
    cause: finds the likely cause of numbers that are not finite.
    receipts: the live actions that act from this chunk on, each with its first picture.
    """

    index: int
    frames: Frames
    latents: jax.Array
    applied: Direction
    latents_finite: jax.Array
    largest: jax.Array
    cause: Callable[[], str]
    making: Making
    decoder: Decoder | None
    receipts: tuple[Applied, ...] = ()

    @property
    def finite(self) -> jax.Array:
        """bool [], whether the latents are finite, and the frames before they were rounded."""
        self.making.finish()
        if self.decoder is None:
            return self.latents_finite
        flags = [self.latents_finite, *(piece.finite for piece in self.making.pieces)]
        return finite_lib.all_of(flags, self.decoder.mesh)

    def check(self) -> None:
        """Waits for the chunk. Warns, once a run, of latents that can be no video.

        Raises:
          NotFiniteError: it has numbers that are not finite; its frames must not be shown.
        """
        if not np.asarray(self.finite):
            raise NotFiniteError(f"chunk {self.index} is not finite, and not shown: {self.cause()}")
        finite_lib.warn_of_latents(f"chunk {self.index}", self.largest)
