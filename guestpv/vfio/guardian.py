"""The process that keeps the memory of a function without an IOMMU from being freed too early.

Without an IOMMU nothing stops a device from writing to pages that its driver no longer has. When a driver is
killed, the kernel frees its memory before it closes its VFIO descriptors and thereby stops the device. This
process has the pages, too, in files of huge pages, until the function can no longer reach memory.

It is a program of the standard library alone, started as a file, with a socket as standard input. A message
is a letter and a number, answered by the letter: ``K`` keeps the file that comes with it, ``D`` drops it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable

BUS_MASTER = 1 << 2
COMMAND = 4
"""Offset of the command register in configuration space."""
DRIVER = "vfio-pci"


def serve(driver: socket.socket, quiet: Callable[[], bool], pause: float = 0.01) -> None:
    """Keep files for a driver, and when it has gone, until the function is ``quiet``."""
    kept: dict[bytes, int] = {}
    try:
        with driver:
            while True:
                message, fds, _, _ = socket.recv_fds(driver, 64, 1)
                if not message:
                    break
                if message[:1] == b"K":
                    kept[message[1:]] = fds[0]
                else:
                    os.close(kept.pop(message[1:]))
                driver.send(message[:1])
    except OSError:
        pass  # the driver went in the middle of a word, which is as good as gone
    while kept and not quiet():
        time.sleep(pause)
    for fd in kept.values():
        os.close(fd)


def is_quiet(address: str) -> bool:
    """Whether a function cannot reach memory, or somebody else has it by now, who reset it."""
    path = f"/sys/bus/pci/devices/{address}"
    try:
        with open(f"{path}/config", "rb") as file:
            command = file.read(COMMAND + 2)[COMMAND:]
        driver = os.path.basename(os.readlink(f"{path}/driver"))
    except OSError:
        return True  # unplugged, or it has no driver: vfio-pci has let it go
    return driver != DRIVER or not int.from_bytes(command, "little") & BUS_MASTER


def main() -> None:
    """Guard the memory of the function whose address is the one argument, as nobody's child."""
    if os.fork():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=os.dup(0)), lambda: is_quiet(sys.argv[1]))


if __name__ == "__main__":
    main()
