"""The TAP link's constants against the kernel's headers, and its errors against a kernel that says no."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from guestpv.errors import AccessDenied, GuestpvError, UsageError
from guestpv.services import tap
from guestpv.services.tap import Tap, offload_flags
from guestpv.spec import net as spec
from guestpv.spec.features import mask
from guestpv.system import System

NEWER_THAN_DEBIAN_12 = {"TUN_F_USO4", "TUN_F_USO6"}


def test_constants_are_those_of_the_kernels_headers(tmp_path: Path) -> None:
    if not Path("/usr/include/linux/if_tun.h").exists():
        pytest.skip("no kernel headers: apt install linux-libc-dev")
    ours: Mapping[str, int] = {
        name: value for name, value in vars(tap).items() if re.match(r"(IFF_|TUN)[A-Z0-9_]+$", name)
    }
    lines = "\n".join(f'#ifdef {n}\nprintf("{n} %u\\n", (unsigned){n});\n#endif' for n in ours)
    enums = "\n".join(f'printf("{n} %u\\n", (unsigned){n});' for n in ("IFNAMSIZ",))
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/if.h>\n#include <linux/if_tun.h>\n"
        f"int main(void) {{\n{lines}\n{enums}\nreturn 0;\n}}\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "abi", source], check=True)
    printed = subprocess.run([tmp_path / "abi"], check=True, capture_output=True, text=True).stdout
    theirs = {name: int(value) for name, value in map(str.split, printed.splitlines())}
    assert theirs.pop("IFNAMSIZ") == tap.IFNAMSIZ
    assert set(ours) - set(theirs) <= NEWER_THAN_DEBIAN_12
    assert theirs == {name: ours[name] for name in theirs}


class Refusing(System):
    """A kernel that answers one call with an error, and otherwise knows only file descriptors."""

    def __init__(self, call: str, code: int) -> None:
        self.refused = (call, code)
        self.open_fds: set[int] = set()
        self.requests: list[int] = []

    def _answer(self, call: str) -> None:
        if call == self.refused[0]:
            raise OSError(self.refused[1], os.strerror(self.refused[1]))

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
        self._answer("open")
        self.open_fds.add(99)
        return 99

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        self.requests.append(request)
        self._answer({tap.TUNSETIFF: "TUNSETIFF", tap.TUNSETOFFLOAD: "TUNSETOFFLOAD"}.get(request, ""))
        return 0


@pytest.mark.parametrize(
    ("call", "code", "kind", "says", "hint"),
    [
        ("open", errno.EACCES, AccessDenied, "/dev/net/tun", "CAP_NET_ADMIN"),
        ("open", errno.ENOENT, GuestpvError, "/dev/net/tun", "modprobe tun"),
        ("TUNSETIFF", errno.EPERM, AccessDenied, "pv7", "CAP_NET_ADMIN"),
        ("TUNSETIFF", errno.EBUSY, UsageError, "pv7", "--name"),
        ("TUNSETOFFLOAD", errno.EINVAL, GuestpvError, "offloads", ""),
    ],
)
def test_a_refusal_is_explained_and_leaves_nothing_open(
    call: str, code: int, kind: type[GuestpvError], says: str, hint: str
) -> None:
    system = Refusing(call, code)
    with pytest.raises(kind, match=says) as caught:
        Tap("pv7", mac=bytes(6), mtu=1500, queues=1, header_size=12, features=0, system=system)
    assert hint in caught.value.hint
    assert not system.open_fds


@pytest.mark.parametrize("name", ["", "a" * 16])
def test_a_name_that_no_interface_can_have_is_refused_first(name: str) -> None:
    system = Refusing("open", errno.EIO)
    with pytest.raises(UsageError, match="no interface name"):
        Tap(name, mac=bytes(6), mtu=1500, queues=1, header_size=12, features=0, system=system)


def test_the_kernel_leaves_undone_what_the_device_does() -> None:
    assert offload_flags(0) == 0
    assert offload_flags(mask((spec.F_GUEST_CSUM, spec.F_GUEST_TSO4, spec.F_MRG_RXBUF))) == 0
    assert offload_flags(mask((spec.F_CSUM, spec.F_HOST_TSO4))) == tap.TUN_F_CSUM | tap.TUN_F_TSO4
    assert offload_flags(1 << spec.F_HOST_USO) == tap.TUN_F_USO4 | tap.TUN_F_USO6
