"""Work that every core has a part of, in processes of their own."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import Any


def run(
    work: Callable[..., Any],
    tasks: Iterable[tuple],
    *,
    start: Callable[..., None] | None = None,
    given: tuple = (),
) -> list[Any]:
    """`work(*task)` of each task, in their order.

    `start(*given)` runs first in each process. After an error no further task begins.
    """
    tasks = list(tasks)
    # Threads of JAX and absl forbid a fork.
    with concurrent.futures.ProcessPoolExecutor(
        max(1, min(os.cpu_count() or 1, len(tasks))),
        multiprocessing.get_context("spawn"),
        initializer=start,
        initargs=given,
    ) as pool:
        futures = [pool.submit(work, *task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
