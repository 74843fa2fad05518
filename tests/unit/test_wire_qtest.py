"""The qtest line codec, byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpv.errors import UsageError
from guestpv.wire import qtest


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (qtest.read_memory(0xE0000014, 1), b"readb 0xe0000014\n"),
        (qtest.read_memory(0, 8), b"readq 0x0\n"),
        (qtest.write_memory(0xE0003000, 2, 3), b"writew 0xe0003000 0x3\n"),
        (qtest.write_memory(1 << 63, 8, (1 << 64) - 1), b"writeq 0x8000000000000000 0xffffffffffffffff\n"),
        (qtest.read_port(0xCFC, 4), b"inl 0xcfc\n"),
        (qtest.write_port(0xCF8, 4, 0x80002000), b"outl 0xcf8 0x80002000\n"),
        (qtest.intercept_inputs("ioapic"), b"irq_intercept_in ioapic\n"),
    ],
)
def test_lines(line: bytes, expected: bytes) -> None:
    assert line == expected


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((qtest.read_memory, 0, 3), "3 bytes"),
        ((qtest.read_port, 0, 8), "8 bytes"),
        ((qtest.read_memory, 1 << 64, 4), "address"),
        ((qtest.read_memory, -1, 4), "address"),
        ((qtest.write_memory, 0, 2, 0x10000), "value"),
        ((qtest.write_memory, 0, 4, -1), "value"),
        ((qtest.read_port, 0x10000, 1), "port"),
        ((qtest.write_port, 0, 1, 256), "value"),
        ((qtest.intercept_inputs, "io apic"), "QOM path"),
        ((qtest.intercept_inputs, "ioapic\nclock_step"), "QOM path"),
        ((qtest.intercept_inputs, ""), "QOM path"),
    ],
)
def test_what_would_abort_qemu_is_refused(arguments: tuple, word: str) -> None:  # type: ignore[type-arg]
    function, *values = arguments
    with pytest.raises(UsageError, match=word):
        function(*values)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"OK", qtest.Answer()),
        (b"OK 0x000000000000001a", qtest.Answer("0x000000000000001a")),
        (b"OK little\r", qtest.Answer("little")),
        (b"FAIL Unknown device", qtest.Failure("Unknown device")),
        (b"ERR", qtest.Failure("")),
        (b"IRQ raise 20", qtest.Interrupt(20, True)),
        (b"IRQ lower 0", qtest.Interrupt(0, False)),
    ],
)
def test_answers(line: bytes, expected: object) -> None:
    assert qtest.parse(line) == expected


@pytest.mark.parametrize("line", [b"", b"IRQ", b"IRQ raise", b"IRQ toggle 3", b"IRQ raise x", b"OKAY", b"ok"])
def test_other_lines_are_no_answers(line: bytes) -> None:
    with pytest.raises(ValueError, match="no qtest answer"):
        qtest.parse(line)


@given(st.binary(max_size=40))
def test_any_line_gives_a_value_or_a_value_error(line: bytes) -> None:
    try:
        parsed = qtest.parse(line)
    except ValueError:
        return
    assert isinstance(parsed, qtest.Answer | qtest.Failure | qtest.Interrupt)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1), st.data())
def test_lines_carry_what_was_asked(width: int, address: int, data: st.DataObject) -> None:
    value = data.draw(st.integers(0, (1 << 8 * width) - 1))
    line = qtest.write_memory(address, width, value).decode()
    command, *numbers = line.split()
    assert command == "write" + "bwlq"[(1, 2, 4, 8).index(width)]
    assert [int(number, 16) for number in numbers] == [address, value]
    assert line.count("\n") == 1


def test_an_answer_without_a_value_is_no_number() -> None:
    assert qtest.Answer("0x1af4").number == 0x1AF4
    with pytest.raises(ValueError, match="invalid literal"):
        _ = qtest.Answer().number
