"""One worker process as its driver sees it: nothing that the process does can block the driver.

A thread of the driver owns the process's connection: it starts the process, sends, receives, and
puts what comes into the driver's queue. If the process dies or stops in the middle of anything,
only this thread waits, until the driver ends the process or the connection.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import cloudpickle

from sharpkit.workers.outcome import Failure, error_message
from sharpkit.workers.serving import serve

LOOK_EVERY = 1.0  # seconds between looks at a process
MOST_STOPPED = 10  # looks in a row at a process that is stopped, until it is given up


@dataclass(frozen=True)
class Died:
    """A process is no more, or of no use any more."""

    reason: str


class Worker:
    """A process, and the item that it has or gets as soon as it is ready.

    Args:
        setup: The pickled function and its limits.
        events: Gets (this worker, message) for `Ready`, `Refused`, `Died` and every result.
        seconds: To start in.
    """

    def __init__(
        self,
        setup: bytes,
        device: str,
        job: Any,
        events: SimpleQueue[tuple[Worker, Any]],
        seconds: float,
    ) -> None:
        self.job, self.ready, self.deadline = job, False, time.monotonic() + seconds
        self._events, self._inbox = events, SimpleQueue[Any]()
        self._ended, self._lock = False, threading.Lock()
        self._process: Any = None
        self._connection: Connection | None = None
        self._stopped = 0
        self._thread = threading.Thread(target=self._talk, args=(setup, device), daemon=True)
        self._thread.start()

    def begin(self, job: Any, item: Any, seconds: float) -> None:
        """Hand it an item, to be finished in so many seconds."""
        self.job, self.ready, self.deadline = job, True, time.monotonic() + seconds
        self._inbox.put(item)

    def look(self) -> None:
        """End a process that has been stopped for long, and the wait for one that is no more.

        The end of its connection does not tell of its death while a child of its own holds it.
        """
        if self._process is None:
            return
        if self._process.exitcode is not None:
            self._hang_up()
            return
        self._stopped = self._stopped + 1 if _is_stopped(self._process.pid) else 0
        if self._stopped >= MOST_STOPPED:
            self._process.kill()

    def reason(self) -> str:
        """How the process ended."""
        if self._stopped >= MOST_STOPPED:
            return f"stopped for {MOST_STOPPED * LOOK_EVERY:g} s"
        if self._process is None:
            return "no process"
        self._process.join(1.0)  # its connection closes a moment before it has an exit code
        code = self._process.exitcode
        return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"

    def end(self) -> None:
        """End the process, whatever it is doing."""
        with self._lock:
            self._ended, starting = True, self._process is None
        self._inbox.put(None)
        if starting:  # left alone, it would complain of a driver that is gone
            self._thread.join(10.0)
        if self._process is not None:
            self._process.kill()
            self._process.join(10.0)  # one that hangs in the kernel outlives even this
            self._hang_up()

    def _talk(self, setup: bytes, device: str) -> None:
        """Of the thread: start, then send items and receive results until the connection ends."""
        try:
            connection = self._start(device)
            connection.send_bytes(setup)
            self._put(connection.recv())
            while (item := self._inbox.get()) is not None:
                self._put(_exchange(connection, item))
        except (EOFError, OSError) as error:
            self._put(Died(str(error)))
        except Exception as error:  # a process that begins while its own start is not over
            self._put(Died(error_message(error)))
        finally:
            with self._lock:
                if self._connection is not None:
                    self._connection.close()
                self._connection = None

    def _start(self, device: str) -> Connection:
        resource_tracker.ensure_running()  # which lets interrupts through again once it has begun
        if hasattr(signal, "pthread_sigmask"):
            # Ctrl-C reaches every process of a terminal: what is started here leaves it to the
            # driver, whose main thread gets it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, device), daemon=True)
        process.start()
        theirs.close()  # else its end would stay open when the worker dies
        with self._lock:
            self._process, self._connection = process, ours
            if self._ended:
                process.kill()
        return ours

    def _put(self, message: Any) -> None:
        self._events.put((self, message))

    def _hang_up(self) -> None:
        """Wake the thread, which gets what has been sent completely, and then the end."""
        with self._lock, suppress(OSError, AttributeError):
            if self._connection is not None:
                with socket.socket(fileno=os.dup(self._connection.fileno())) as end:
                    end.shutdown(socket.SHUT_RDWR)


def _exchange(connection: Connection, item: tuple[Any]) -> Any:
    """Send an item; what comes back."""
    try:
        content = cloudpickle.dumps(item[0])
    except Exception as error:  # pickling runs code of any class
        return Failure(f"it cannot be sent to a worker: {error_message(error)}")
    connection.send_bytes(content)
    answer = connection.recv_bytes()
    try:
        return pickle.loads(answer)
    except Exception as error:
        return Failure(f"its result cannot be read: {error_message(error)}")


def _is_stopped(pid: int) -> bool:
    """Whether a child is stopped, as by SIGSTOP, where the system tells."""
    if not hasattr(os, "waitid"):
        return False
    with suppress(OSError):
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG | os.WNOWAIT)
        return found is not None and found.si_code == os.CLD_STOPPED
    return False
