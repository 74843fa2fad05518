"""Interrupts over the socket: attached, triggered, masked, taken away."""

from __future__ import annotations

import os
from errno import EINVAL, ENOTSUP

import pytest

from guestpv.pci.vfio_user import Session
from guestpv.system import SYSTEM
from guestpv.wire import vfio_user as wire
from guestpv.wire.vfio_user import (
    DmaMap,
    IrqSet,
    IrqSetFlag,
)

from .kit import PAGE, RW, Serve, eventfd, fired, opened, refused


def act(flags: int, index: int = wire.MSIX, start: int = 0, count: int = 1, data: bytes = b"") -> IrqSet:
    return IrqSet(20 + len(data), flags, index, start, count, data)


ATTACH = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
TRIGGER = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_TRIGGER


def test_vectors_are_attached_triggered_and_taken_away(raw: Session) -> None:
    fds = eventfd(), eventfd()
    raw.call(wire.SET_IRQS, act(ATTACH, count=2), fds)
    raw.call(wire.SET_IRQS, act(TRIGGER, start=1))
    assert [fired(fd) for fd in fds] == [False, True]
    raw.call(wire.SET_IRQS, act(IrqSetFlag.DATA_BOOL | IrqSetFlag.ACTION_TRIGGER, count=2, data=b"\1\0"))
    assert [fired(fd) for fd in fds] == [True, False]
    raw.call(wire.SET_IRQS, act(ATTACH, start=1))
    raw.call(wire.SET_IRQS, act(TRIGGER, count=2))
    assert [fired(fd) for fd in fds] == [True, False], "no descriptor takes vector 1's away"
    raw.call(wire.SET_IRQS, act(TRIGGER, count=0))
    raw.call(wire.SET_IRQS, act(TRIGGER, count=2))
    assert [fired(fd) for fd in fds] == [False, False]
    for fd in fds:
        os.close(fd)


def test_intx_is_masked_at_each_event_and_by_command(serve: Serve) -> None:
    server = serve()
    function, raw = server.function, Session(server.path, 60)
    fd = eventfd()
    raw.call(wire.SET_IRQS, act(ATTACH, wire.INTX), (fd,))

    def line(level: bool) -> None:
        with function.executor:
            function.interrupts.set_intx(level)

    def unmask() -> None:
        raw.call(wire.SET_IRQS, act(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK, wire.INTX))

    line(True)
    assert fired(fd)
    line(False)
    line(True)
    assert not fired(fd), "masked by the event before"
    unmask()
    assert fired(fd), "the line is still up"
    line(False)
    unmask()
    raw.call(wire.SET_IRQS, act(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_MASK, wire.INTX))
    line(True)
    assert not fired(fd)
    # MSI-X comes and goes; INTx stays as it was.
    raw.call(wire.SET_IRQS, act(TRIGGER, wire.MSIX, count=0))
    line(True)
    assert not fired(fd)
    unmask()
    assert fired(fd)
    raw.call(wire.SET_IRQS, act(TRIGGER, wire.INTX, count=0))
    line(False)
    line(True)
    assert not fired(fd)
    raw.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("action", "errno"),
    [
        (act(ATTACH, start=1, count=2), EINVAL),
        (act(ATTACH, index=wire.ERR, start=1), EINVAL),
        (act(ATTACH, index=1), EINVAL),
        (act(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK, index=wire.REQ), ENOTSUP),
        (act(IrqSetFlag.DATA_NONE, data=b"\1\1\1"), ENOTSUP),
        (act(ATTACH, index=9), EINVAL),
        (act(ATTACH, count=0), ENOTSUP),
        (act(IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_UNMASK, wire.INTX), ENOTSUP),
        (act(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_MASK, wire.MSIX), ENOTSUP),
        (act(IrqSetFlag.DATA_BOOL | IrqSetFlag.ACTION_TRIGGER, count=2, data=b"\1"), EINVAL),
        (act(IrqSetFlag.ACTION_TRIGGER), EINVAL),
        (act(0xFFFF_FFFF), EINVAL),
    ],
)
def test_interrupt_actions_that_make_no_sense_are_refused(raw: Session, action: IrqSet, errno: int) -> None:
    assert refused(raw, wire.SET_IRQS, action) == errno


def test_descriptors_that_do_not_fit_are_refused(raw: Session) -> None:
    fds = eventfd(), eventfd(), eventfd()
    assert refused(raw, wire.SET_IRQS, act(ATTACH, count=2), fds) == ENOTSUP
    assert refused(raw, wire.SET_IRQS, act(ATTACH), (0,)) == EINVAL
    assert refused(raw, wire.DMA_MAP, DmaMap(32, RW, 0, 0, PAGE), fds) == EINVAL
    assert refused(raw, wire.RESET, wire.Nothing(), fds[:1]) == EINVAL
    for fd in fds:
        os.close(fd)


def test_a_function_asks_to_be_let_go_of_and_reports_errors(serve: Serve) -> None:
    server = serve()
    with opened(server) as transport:
        request, error = transport.release_fds()
        assert request is not None
        assert error is not None
        server.function.request_removal()
        assert SYSTEM.poll([request, error], 60) == [request]
        server.function.report_error()
        assert SYSTEM.poll([error], 60) == [error]
