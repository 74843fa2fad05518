"""The guest lab: build a small Debian-kernel guest, boot it under QEMU and run commands in it.

``with Machine(kernel="6.1", devices=["virtio-rng-pci,id=rng0"]) as vm: vm.run("guestpv list")``
"""

from guestvm.errors import GuestDied, GuestTimeout, LabError
from guestvm.hostfiles import HostFiles
from guestvm.line import default_lab
from guestvm.link import Process, Result
from guestvm.machine import Machine

__all__ = [
    "GuestDied",
    "GuestTimeout",
    "HostFiles",
    "LabError",
    "Machine",
    "Process",
    "Result",
    "default_lab",
]
