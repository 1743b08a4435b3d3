"""Videos from their prompts: steps a session, and keeps the device busy while the host writes."""

from collections.abc import Iterable, Iterator

from longlive_jax.sampling.batches import Batch
from longlive_jax.sampling.session import Chunk, Engine, Session, Start, Texts


def render(engine: Engine, texts: Texts, batch: Batch, seed: int = 0) -> Iterator[Chunk]:
    """Yields the chunks of a batch of videos, each row being one of them.

    Nothing yielded has been waited for; and a chunk is yielded when the work of the next one is
    already given to the device, so that a consumer who waits for a chunk never leaves the device
    idle. A continued video starts with the chunks that it continues.
    """
    return ahead(_chunks(engine, texts, batch, seed))


def ahead[T](results: Iterable[T]) -> Iterator[T]:
    """`results`, each when the work of the next one has been given to the device."""
    results = iter(results)
    for last in results:
        for result in results:
            yield last
            last = result
        yield last


def _chunks(engine, texts, batch, seed):
    start = Start(
        height=batch.height, width=batch.width, seed=seed,
        samples=tuple(range(batch.index, batch.index + len(batch.videos))), whole=True,
        noise=batch.noise, first_frame=batch.first_frame, past=batch.prefix,
        references=batch.references,
    )  # fmt: skip
    session = Session(engine, texts, start)
    if batch.actions is not None:
        session.plan(batch.actions)
    session.direct([video.chunks[0].prompt for video in batch.videos])
    if batch.prefix is not None:
        for _ in range(batch.prefix.shape[1] // engine.cfg.model.chunk_frames):
            yield session.step()
    sample = engine.cfg.sample
    for chunks in zip(*(video.chunks for video in batch.videos)):
        # What changes inside a shot is the same for all of a batch, and so are steps.
        recache = chunks[0].recaches(sample.recache)
        session.adjust(
            steps=chunks[0].steps or sample.steps,
            guidance=[sample.guidance_scale if c.guidance is None else c.guidance for c in chunks],
        )
        session.direct(
            [c.prompt for c in chunks], [c.cut for c in chunks], recache,
            [c.toward or c.prompt for c in chunks], [c.weight for c in chunks],
        )  # fmt: skip
        yield session.step()
