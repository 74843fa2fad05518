"""Networks that harm nobody: a network namespace of our own, and TAP links in it for guests."""

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000


@contextmanager
def own_network() -> Iterator[list[str]]:
    """A network namespace for the calling thread and those it starts; yields a command that runs in it.

    PermissionError where none can be made.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET):
            code = ctypes.get_errno()
            raise PermissionError(
                code, f"a network namespace cannot be made: {os.strerror(code)}; run as root"
            )
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            place = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
            yield ["nsenter", f"--net={place}"]
        finally:
            if libc.setns(home, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot return to the network namespace")
    finally:
        os.close(home)


def add_tap(name: str, number: int, queues: int = 1, mtu: int = 1500) -> str:
    """A TAP link with 10.9.NUMBER.1/24 and fd09:NUMBER::1/64 in this namespace; QEMU's -netdev for it."""
    several = "multi_queue" if queues > 1 else ""
    for words in (
        f"tuntap add dev {name} mode tap vnet_hdr {several}",
        f"link set {name} mtu {mtu} up",
        f"address add 10.9.{number}.1/24 dev {name}",
        f"address add fd09:{number}::1/64 dev {name} nodad",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    count = f",queues={queues}" if queues > 1 else ""
    return f"tap,id={name},ifname={name},script=no,downscript=no,vhost=off{count}"
