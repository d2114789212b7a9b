"""What a worker process does: it computes one item after the other until its driver is gone."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
from tqdm import tqdm

from sharpkit.memory import limit_memory
from sharpkit.workers.outcome import Failure, attempt, error_message
from sharpkit.workers.threads import limited_threads


@dataclass(frozen=True)
class Ready:
    """The worker can take an item."""


@dataclass(frozen=True)
class Refused:
    """The worker cannot load what it was given to compute."""

    reason: str


def serve(connection: Connection, device: str) -> None:
    """Receive the pickled function and its limits, then items; send what they give."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    try:
        function, threads, memory = cloudpickle.loads(connection.recv_bytes())
    except EOFError:
        return
    except Exception as error:  # unpickling runs code of any class
        connection.send(Refused(error_message(error)))
        return
    with limited_threads(threads):
        limit_memory(memory, torch.device(device))
        connection.send(Ready())
        while True:
            try:
                content = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(_answer(function, content, device))


def _answer(function: Callable[[Any, str], Any], content: bytes, device: str) -> bytes:
    """The pickled result of a pickled item, or why there is none."""
    try:
        item = cloudpickle.loads(content)
    except Exception as error:  # as above
        return pickle.dumps(Failure(f"its worker cannot read it: {error_message(error)}"))
    result = attempt(function, item, device)
    try:
        answer: bytes = cloudpickle.dumps(result)
    except Exception as error:  # pickling runs code of any class too
        return pickle.dumps(Failure(f"its result cannot be sent: {error_message(error)}"))
    return answer


def _die_with_parent() -> None:
    """End this process when the one that started it is gone, however that happened."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
