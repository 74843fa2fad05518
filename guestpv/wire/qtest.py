"""QEMU's qtest protocol: one text line per access, one line per answer, interrupts in between.

A line QEMU cannot parse makes it abort, so every line is checked here before it is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError

MEMORY_SUFFIX = {1: "b", 2: "w", 4: "l", 8: "q"}
PORT_SUFFIX = {1: "b", 2: "w", 4: "l"}
ADDRESS_LIMIT = 1 << 64
PORT_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    """The command was carried out; ``value`` is what it returned, or an empty string."""

    value: str = ""

    @property
    def number(self) -> int:
        """The value as a number.

        Raises:
            ValueError: the command returned none.
        """
        return int(self.value, 0)


@dataclass(frozen=True, slots=True)
class Failure:
    """QEMU did not carry the command out; ``reason`` is its own text."""

    reason: str


@dataclass(frozen=True, slots=True)
class Interrupt:
    """An intercepted interrupt line changed: pin ``line`` is now ``raised`` or lowered."""

    line: int
    raised: bool


def _checked(what: str, number: int, limit: int) -> int:
    if not 0 <= number < limit:
        raise UsageError(f"{what} {number:#x} is outside 0..{limit - 1:#x}", where="qtest")
    return number


def _suffix(table: dict[int, str], width: int) -> str:
    if width not in table:
        widths = ", ".join(map(str, table))
        raise UsageError(f"an access of {width} bytes does not exist; widths are {widths}", where="qtest")
    return table[width]


def read_memory(address: int, width: int) -> bytes:
    """Line that reads 1, 2, 4 or 8 bytes at a guest-physical address; answered by a number."""
    return b"read%s %#x\n" % (
        _suffix(MEMORY_SUFFIX, width).encode(),
        _checked("address", address, ADDRESS_LIMIT),
    )


def write_memory(address: int, width: int, value: int) -> bytes:
    """Line that writes 1, 2, 4 or 8 bytes at a guest-physical address."""
    return b"write%s %#x %#x\n" % (
        _suffix(MEMORY_SUFFIX, width).encode(),
        _checked("address", address, ADDRESS_LIMIT),
        _checked("value", value, 1 << 8 * width),
    )


def read_port(port: int, width: int) -> bytes:
    """Line that reads 1, 2 or 4 bytes from an I/O port; answered by a number."""
    return b"in%s %#x\n" % (_suffix(PORT_SUFFIX, width).encode(), _checked("port", port, PORT_LIMIT))


def write_port(port: int, width: int, value: int) -> bytes:
    """Line that writes 1, 2 or 4 bytes to an I/O port."""
    return b"out%s %#x %#x\n" % (
        _suffix(PORT_SUFFIX, width).encode(),
        _checked("port", port, PORT_LIMIT),
        _checked("value", value, 1 << 8 * width),
    )


def intercept_inputs(device: str) -> bytes:
    """Line that makes QEMU report the input pins of an interrupt controller by its QOM path."""
    if not device or any(character.isspace() for character in device):
        raise UsageError(f"{device!r} is no QOM path", where="qtest")
    return b"irq_intercept_in %s\n" % device.encode()


def parse(line: bytes) -> Answer | Failure | Interrupt:
    """What one line from QEMU, without its newline, says.

    Raises:
        ValueError: it is no line of this protocol.
    """
    kind, _, rest = line.decode("utf-8", "replace").strip().partition(" ")
    if kind == "OK":
        return Answer(rest)
    if kind in ("FAIL", "ERR"):
        return Failure(rest)
    if kind == "IRQ":
        action, _, number = rest.partition(" ")
        if action in ("raise", "lower") and number.isdecimal():
            return Interrupt(int(number), action == "raise")
    raise ValueError(f"{line!r} is no qtest answer")
