"""QEMU's monitor, through the ``qemu.qmp`` package, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from ..errors import GuestpvError, TimeLimit, UsageError
from .qemu_ram import GuestRam

LEAVE_LIMIT = 1.0
"""Seconds that a monitor has to say goodbye."""


class Emulator(Protocol):
    """A QEMU, started or joined.

    Attributes:
        name: how messages call it.
        version: of QEMU.
        pid: of its process.
        ram: its RAM.
        qtest: our end of its qtest socket.
        answer_limit: seconds that it has for an answer.
    """

    name: str
    version: tuple[int, int, int]
    pid: int
    ram: GuestRam
    qtest: socket.socket
    answer_limit: float

    @property
    def qmp(self) -> Qmp:
        """Its monitor."""
        ...

    def check(self) -> None:
        """Raise what ended it or our connection, if anything did."""
        ...

    def answered(self) -> None:
        """Note that it answered."""
        ...

    def stuck(self, doing: str) -> GuestpvError:
        """The error for an answer that did not come in time."""
        ...

    def died(self, doing: str) -> GuestpvError:
        """The error for a closed socket."""
        ...

    def close(self) -> None:
        """End it, or leave it. Idempotent."""
        ...


class Qmp:
    """A QEMU's monitor."""

    def __init__(self, qemu: Emulator, monitor: socket.socket) -> None:
        try:
            from qemu.qmp import QMPClient
        except ImportError as error:
            raise UsageError(
                f"QEMU's monitor needs the Python package qemu.qmp ({error})",
                where=qemu.name,
                hint="pip install 'guestpv[qemu]'",
            ) from error
        self._qemu = qemu
        self._client = QMPClient("guestpv")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="guestpv-qmp", daemon=True)
        self._thread.start()
        try:
            self._run("connect", self._client.connect(monitor), qemu.answer_limit)
        except BaseException:
            self.close()
            raise

    def _run(self, doing: str, work: Coroutine[Any, Any, Any], limit: float) -> Any:
        from qemu.qmp import ExecuteError, QMPError

        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(limit)
        except TimeoutError:
            future.cancel()
            raise self._qemu.stuck(f"QMP {doing}") from None
        except ExecuteError as error:
            raise GuestpvError(f"QMP {doing}: {error}", where=self._qemu.name) from error
        except (QMPError, EOFError, OSError) as error:
            raise self._qemu.died(f"QMP {doing}") from error

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run one command and return what it returned.

        Raises:
            GuestpvError: QEMU refused it; the message has its own words.
            TimeLimit: no answer in time; that QEMU was killed.
            DeviceGone: QEMU is not there any more.
        """
        return self._run(
            command, self._client.execute(command, dict(arguments or {})), self._qemu.answer_limit
        )

    def wait_event(self, name: str, timeout: float = 5.0) -> dict[str, Any]:
        """The next event ``name`` of the monitor; other events before it are dropped.

        Raises:
            TimeLimit: it did not come within ``timeout`` seconds.
        """

        async def wait() -> dict[str, Any] | None:
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(timeout):
                    while True:
                        event = await self._client.events.get()
                        if event["event"] == name:
                            return dict(event)
            return None

        found: dict[str, Any] | None = self._run(f"event {name}", wait(), timeout + self._qemu.answer_limit)
        if found is None:
            raise TimeLimit(f"QMP event {name} did not come within {timeout} s", where=self._qemu.name)
        return found

    async def _leave(self) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LEAVE_LIMIT):
                await self._client.disconnect()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def close(self) -> None:
        """Disconnect and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._leave(), self._loop).add_done_callback(
            lambda _: self._loop.call_soon_threadsafe(self._loop.stop)
        )
        self._thread.join(2 * LEAVE_LIMIT)
        if not self._thread.is_alive():
            self._loop.close()
