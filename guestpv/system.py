"""The one door to the operating system.

Everything that opens, maps, polls or asks the kernel goes through a ``System``, so that tests can put a
fake kernel, or a fault, behind it. Methods raise ``OSError`` as the kernel's calls do; explaining what an
errno means is left to the caller, who knows what it was doing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE_SIZE: Final = mmap.PAGESIZE
HUGE_PAGE_SIZE: Final = 2 << 20
MAP_FIXED: Final = 0x10
MAP_HUGETLB: Final = 0x40000
MAP_HUGE_2MB: Final = 21 << 26
PFN_MASK: Final = (1 << 55) - 1
"""Bits 0-54 of a ``/proc/self/pagemap`` entry."""
PAGE_PRESENT: Final = 1 << 63


class System:
    """The real kernel."""

    # Files and file descriptors

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
        """Open a file; the descriptor is closed on exec."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        """Close a descriptor. It is closed even where an error is raised."""
        os.close(fd)

    def read(self, fd: int, size: int) -> bytes:
        """Up to ``size`` bytes."""
        return os.read(fd, size)

    def write(self, fd: int, data: bytes) -> int:
        """Number of bytes written."""
        return os.write(fd, data)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes from ``offset``, in one system call."""
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Number of bytes written at ``offset``, in one system call."""
        return os.pwrite(fd, data, offset)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """One ioctl; a ``bytearray`` is the structure that the kernel reads and may change."""
        return fcntl.ioctl(fd, request, argument)

    def flock(self, fd: int) -> None:
        """Take an exclusive lock or raise ``BlockingIOError``; closing the descriptor releases it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def eventfd(self) -> int:
        """A non-blocking eventfd with the value 0."""
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def poll(self, fds: Iterable[int], timeout: float | None) -> list[int]:
        """Those of ``fds`` that can be read, or are in error, within ``timeout`` seconds (None: for ever)."""
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        return [fd for fd, _ in poller.poll(None if timeout is None else max(0.0, timeout) * 1000)]

    # Paths: sysfs, procfs, device nodes, our own state

    def read_text(self, path: str) -> str:
        """Text of a small file, without white space or NULs at its end."""
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\0 \t\r\n")

    def write_text(self, path: str, text: str) -> None:
        """Write an attribute of sysfs or procfs in one system call; the file must exist."""
        fd = self.open(path, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def listdir(self, path: str) -> list[str]:
        """Sorted names in a directory."""
        return sorted(os.listdir(path))

    def readlink(self, path: str) -> str:
        """What a symbolic link says."""
        return os.readlink(path)

    def exists(self, path: str) -> bool:
        """Whether the path exists, links followed."""
        return os.path.exists(path)

    def stat(self, path: str) -> os.stat_result:
        """Status of a path, links not followed."""
        return os.lstat(path)

    def mkdir(self, path: str, mode: int) -> None:
        """Make a directory."""
        os.mkdir(path, mode)

    def rename(self, source: str, target: str) -> None:
        """Put ``source`` in the place of ``target``, atomically."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def chown(self, path: str, uid: int) -> None:
        """Give a path to a user; its group stays."""
        os.chown(path, uid, -1)

    # Memory

    @cached_property
    def _libc(self) -> ctypes.CDLL:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
        libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return libc

    def mmap(
        self,
        size: int,
        *,
        fd: int = -1,
        offset: int = 0,
        protection: int = mmap.PROT_READ | mmap.PROT_WRITE,
        flags: int = mmap.MAP_SHARED,
        address: int = 0,
    ) -> int:
        """Map memory; returns its CPU address.

        Python's own ``mmap`` keeps a duplicate of the descriptor and cannot be closed while a view of it
        lives, which would keep a VFIO group busy: hence libc's, by address.
        """
        pointer = self._libc.mmap(address, size, protection, flags, fd, offset)
        if pointer is None or pointer == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"mmap of {size} bytes")
        return int(pointer)

    def munmap(self, pointer: int, size: int) -> None:
        """Unmap memory. No view of it may be left: reading one would kill the process."""
        if self._libc.munmap(pointer, size):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "munmap")

    def madvise(self, pointer: int, size: int, advice: int) -> None:
        """Tell the kernel how memory will be used (``mmap.MADV_*``)."""
        if self._libc.madvise(pointer, size, advice):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "madvise")

    def window(self, pointer: int, size: int) -> ctypes.Array[ctypes.c_uint8]:
        """A buffer object over mapped memory; every numpy view made of it keeps this object alive."""
        return (ctypes.c_uint8 * size).from_address(pointer)

    def huge_file(self, size: int) -> int:
        """Descriptor of a nameless file of ``size`` bytes in reserved huge pages of 2 MiB."""
        fd = os.memfd_create("guestpv", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def page_frames(self, pointer: int, count: int) -> NDArray[np.uint64]:
        """Physical page numbers of ``count`` pages from ``pointer`` on, by ``/proc/self/pagemap``.

        An array of uint64, shape ``(count,)``, or shorter where the address space ends. Without
        CAP_SYS_ADMIN the kernel answers 0 for every page, with no error; an absent page is 0 too. Callers
        refuse 0.
        """
        fd = self.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            raw = self.pread(fd, 8 * count, pointer // PAGE_SIZE * 8)
        finally:
            self.close(fd)
        import numpy as np  # takes longer than all else here, and most commands do without

        entries = np.frombuffer(raw, np.uint64)
        return np.where(entries & np.uint64(PAGE_PRESENT), entries & np.uint64(PFN_MASK), np.uint64(0))

    # Process and machine

    def getrlimit(self, limit: int) -> tuple[int, int]:
        """Soft and hard limit (``resource.RLIMIT_*``); ``resource.RLIM_INFINITY`` where there is none."""
        return resource.getrlimit(limit)

    def getpid(self) -> int:
        """Id of this process."""
        return os.getpid()

    def geteuid(self) -> int:
        """User that this process acts as."""
        return os.geteuid()

    def environ(self) -> Mapping[str, str]:
        """Environment of this process."""
        return os.environ

    def user_id(self, name: str) -> int:
        """Number of a user; KeyError where there is none."""
        import pwd

        return pwd.getpwnam(name).pw_uid

    def monotonic(self) -> float:
        """Seconds of a clock that never goes back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Do nothing for a while."""
        time.sleep(seconds)

    def run(self, command: Sequence[str], timeout: float = 30.0) -> tuple[int, str]:
        """Run a program, without a shell; its exit status and what it printed.

        Raises:
            TimeoutError: it did not end within ``timeout`` seconds, and was killed.
        """
        import subprocess

        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
                text=True,
                errors="replace",
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{command[0]} did not end within {timeout:g} s") from error
        return done.returncode, done.stdout.strip()

    def start_daemon(self, command: Sequence[str], fd: int) -> None:
        """Run a program that goes into the background by itself, in a session of its own, without a shell.

        It inherits ``fd`` as its standard input and nothing else that is open here. Returns once it has gone
        there; ``OSError`` where it did not.
        """
        import subprocess

        nothing = subprocess.DEVNULL
        done = subprocess.run(
            command, stdin=fd, stdout=nothing, stderr=nothing, start_new_session=True, cwd="/", check=False
        )
        if done.returncode:
            raise OSError(errno.ECHILD, f"it ended with {done.returncode}", command[0])

    def pci_addresses(self) -> list[str]:
        """Addresses of all PCI functions, by udev.

        Raises:
            ImportError: libudev is not installed.
        """
        import pyudev

        return sorted(device.sys_name for device in pyudev.Context().list_devices(subsystem="pci"))


SYSTEM: Final = System()
