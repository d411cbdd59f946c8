"""Commands that torchrun starts as several processes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from lobs_native.errors import ArgumentError, RankError

__all__ = ["LOST", "check_alone", "is_told_elsewhere", "joined", "rank"]

LOST = 75  # the exit code where another process is gone

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_store: Any = None  # of the processes that are joined


def rank() -> int:
    """The number of this process among those that torchrun started; 0 without it."""
    return int(os.environ["RANK"]) if _launched() else 0


def _launched() -> bool:
    return all(name in os.environ for name in _NEEDED) and int(os.environ["WORLD_SIZE"]) > 1


def check_alone(command: str) -> None:
    """Raise ArgumentError if torchrun has started several processes, each of which would do all the
    work of this command."""
    if _launched():
        raise ArgumentError(
            f"torchrun: {command} runs in one process, and {os.environ['WORLD_SIZE']} were "
            "started; start it without torchrun (prune shares its work)"
        )


@contextlib.contextmanager
def joined(seconds: float) -> Iterator[Any]:
    """The process group of all that torchrun started, with gloo; None without it. ``seconds``: how
    long one waits for another.

    Each process takes the CUDA device of its number on its computer.
    """
    global _store
    if not seconds > 0:
        raise ArgumentError(f"--rank-timeout: {seconds:g}; it is a time in seconds, above 0")
    if not _launched():
        yield None
        return
    from torch import distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    timeout = timedelta(seconds=seconds)
    # Joining may last longer than its time limit, where a process ends in the midst of it.
    watch = threading.Timer(1.5 * seconds, _give_up)
    watch.daemon = True
    watch.start()
    try:
        store, number, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=timeout)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise RankError(f"torchrun: the processes did not find one another: {text}") from error
    finally:
        watch.cancel()
    _store = store
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _give_up() -> None:
    print("lobs-native: torchrun: the processes did not find one another in time", file=sys.stderr)
    os._exit(LOST)


def is_told_elsewhere(error: BaseException) -> bool:
    """Whether another process writes the message of an error: the one that it comes from; or, where
    a process is gone, the first that notices."""
    if (source := getattr(error, "rank", None)) is not None:
        return bool(source != rank())
    if _store is None or not isinstance(error, RankError):
        return False
    try:
        return bool(_store.add("lobs_native/told", 1) > 1)
    except RuntimeError:  # it has ended with the process that kept it
        return False
