"""Who runs a device: the thread that touches it, or one of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

Job = Callable[[], None]


class Executor:
    """Runs a device's jobs one at a time and keeps register accesses apart from them.

    Entered as a context, it holds the device still. Jobs posted meanwhile run afterwards: in the
    thread that posted them, or, where somebody else holds the device, in that thread when it lets go; so
    two devices can post to each other without a deadlock and without recursion. With ``threaded`` a
    thread of the device's own runs all jobs.

    Attributes:
        failure: the first exception a job of the device's own thread raised; ``close`` raises it.
    """

    def __init__(self, name: str, threaded: bool = False) -> None:
        self._lock = threading.RLock()
        self._jobs: deque[Job] = deque()
        self._running = False
        self._closed = False
        self._wake = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
            self._thread.start()

    @property
    def threaded(self) -> bool:
        """Whether the device has a thread of its own."""
        return self._thread is not None

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        if self._jobs and self._thread is None:
            self._drain()

    def post(self, job: Job) -> None:
        """Run a job now or soon. After ``close`` it is dropped."""
        if self._closed:
            return
        self._jobs.append(job)
        if self._thread is not None:
            self._wake.release()
        else:
            self._drain()

    def _drain(self) -> None:
        """Run what is posted unless somebody holds the device, who will look again when letting go."""
        while self._jobs and not self._running and self._lock.acquire(blocking=False):
            try:
                self._run()
            finally:
                self._lock.release()

    def _run(self) -> None:
        """Run all posted jobs; the lock is held."""
        if self._running:
            return
        self._running = True
        try:
            while self._jobs:
                self._jobs.popleft()()
        finally:
            self._running = False

    def _serve(self) -> None:
        while True:
            self._wake.acquire()
            if self._closed:
                return
            with self._lock:
                try:
                    self._run()
                except Exception as error:
                    self.failure = self.failure or error

    def close(self) -> None:
        """Stop. Raises what the device's own thread died of, if it did."""
        self._closed = True
        self._jobs.clear()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._wake.release()
            self._thread.join()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
