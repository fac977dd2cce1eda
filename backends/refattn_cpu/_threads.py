"""Tasks shared out to threads. Which thread takes a task never matters to its answer."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")


def share(work: Callable[[Task], None], tasks: Sequence[Task], threads: int | None) -> None:
    """Call `work` on every task, in several threads if there are several tasks.

    The caller only waits, so that Ctrl-C reaches it: tasks that have not begun are then dropped.
    """
    threads = min(len(tasks), threads or os.cpu_count() or 1)
    if threads <= 1:
        for task in tasks:
            work(task)
        return
    futures = [_pool(os.getpid(), threads).submit(work, task) for task in tasks]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return this process's pool: the threads of another do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"refattn_cpu_{process}")
