"""DPDK's testpmd as a child: device or driver of a race, talked to through its prompt."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from peers.errors import PeerError
from peers.tree import LIBRARIES, Tree

PROMPT = b"testpmd> "
COUNTER = {
    "received": re.compile(rb"RX-packets: *(\d+)"),
    "sent": re.compile(rb"TX-packets: *(\d+)"),
}


class Testpmd:
    """One testpmd with one port. A context manager.

    Args:
        vdev: the port, such as ``net_vhost0,iface=/run/x.sock,queues=1``.
        cores: CPU for the commands and CPU for the packets.
        options: further arguments of testpmd itself.
        segments: one file per memory type, without which a virtio-user port moves nothing.

    Raises:
        PeerError: it does not come to its prompt.
    """

    def __init__(
        self,
        tree: Tree,
        vdev: str,
        cores: tuple[int, int],
        options: Sequence[str] = (),
        *,
        memory: int = 256,
    ) -> None:
        drivers = next((tree.root / LIBRARIES[0] / "dpdk").glob("pmds-*"))
        command = [*tree.program("dpdk-testpmd"), "-d", str(drivers), "--no-huge", "-m", str(memory)]
        command += ["--no-pci", "--no-shconf", "--no-telemetry", "-l", f"{cores[0]},{cores[1]}"]
        command += ["--main-lcore", str(cores[0])]
        command += ["--vdev", vdev, "--", "--interactive", "--nb-cores=1", "--total-num-mbufs=8192", *options]
        self._screen, theirs = pty.openpty()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=False
        )
        os.close(theirs)
        self._seen = b""
        try:
            self._read_to_prompt(20)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def _read_to_prompt(self, limit: float) -> bytes:
        deadline = time.monotonic() + limit
        while PROMPT not in self._seen:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._screen], [], [], left)[0]:
                raise PeerError(f"testpmd does not answer within {limit:g} s: {self._seen[-1000:].decode()}")
            try:
                self._seen += os.read(self._screen, 65536)
            except OSError:
                raise PeerError(f"testpmd ended: {self._seen[-1000:].decode()}") from None
        said, _, self._seen = self._seen.partition(PROMPT)
        return said

    def tell(self, *commands: str) -> bytes:
        """Give commands; what the last one printed."""
        said = b""
        assert self._process.stdin is not None
        for command in commands:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
            said = self._read_to_prompt(10)
        return said

    def count(self, what: str) -> int:
        """Packets ``received`` or ``sent`` so far."""
        found = COUNTER[what].search(self.tell("show port stats 0"))
        if found is None:
            raise PeerError(f"testpmd does not say how many packets it {what}")
        return int(found[1])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        os.close(self._screen)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
