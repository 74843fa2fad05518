"""Servers and clients that lie, fall silent or die."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable
from errno import EINVAL, ENOTSUP
from pathlib import Path

import pytest

import guestpv
from guestpv.drivers.net import Net
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceGone, GuestpvError, TimeLimit, UsageError
from guestpv.pci.vfio_user import CommandRefused, VfioUserFunction
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.wire import vfio_user as wire
from guestpv.wire.stream import close_all
from guestpv.wire.vfio_user import (
    Channel,
    Command,
    Message,
    RegionAccess,
    RegionFlag,
    Version,
)

from .kit import PAGE, Script, Serve, connected, descriptors, eventfd, fired, mappings, opened, until


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    with pytest.raises(GuestpvError, match="there is no such socket") as caught:
        guestpv.open(f"vfio-user:{path}")
    assert f"guestpv serve vfio-user:{path}" in caught.value.hint
    path.write_text("a file")
    with pytest.raises(GuestpvError, match="nobody listens"):
        guestpv.open(f"vfio-user:{path}")
    for body in ("", "x" * 108):
        with pytest.raises(UsageError, match="1 to 107 bytes"):
            guestpv.open(f"vfio-user:{body}")


@pytest.mark.parametrize("query", ["?timeout=0", "?timeout=soon", "?timeout=nan", "?speed=1"])
def test_parameters_that_make_no_sense(serve: Serve, query: str) -> None:
    with pytest.raises(UsageError, match=r"timeout|speed"):
        guestpv.open(f"vfio-user:{serve().path}{query}")


def ordinary(channel: Channel, message: Message) -> bool:
    """What a server says that has one 4 KiB BAR 0, a request interrupt, and nothing else."""
    exchange = wire.EXCHANGES[message.command]
    question = exchange.sends.unpack(message.payload)
    answers: dict[int, Callable[[], object]] = {
        Command.VERSION: lambda: Version(0, 0, {}),
        Command.DEVICE_GET_INFO: lambda: wire.DeviceInfo(16, wire.DeviceFlag.PCI, 9, 5),
        Command.DEVICE_GET_IRQ_INFO: lambda: wire.IrqInfo(
            16, 1, question.index, int(question.index == wire.REQ)
        ),
        Command.DEVICE_GET_REGION_INFO: lambda: wire.RegionInfo(32, 3, question.index, 0, PAGE),
        Command.REGION_READ: lambda: RegionAccess(
            question.offset, question.region, question.count, bytes(range(question.count))
        ),
        Command.REGION_WRITE: lambda: RegionAccess(question.offset, question.region, question.count),
        Command.DMA_UNMAP: lambda: question,
    }
    channel.send(message.answer(exchange.answers.pack(answers.get(message.command, wire.Nothing)())))
    return True


def test_a_bar_that_the_server_offers_is_mapped(scripted: Callable[[Script], str]) -> None:
    fd = os.memfd_create("guestpv-test-bar")
    os.ftruncate(fd, 2 * PAGE)
    os.pwrite(fd, struct.pack("<I", 0xCAFEF00D), PAGE + 8)
    reads: list[int] = []

    def script(channel: Channel, message: Message) -> bool:
        if message.command == Command.DEVICE_GET_REGION_INFO:
            flags = RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
            info = wire.RegionInfo(32, flags, 0, 0, PAGE, PAGE)
            reply = message.answer(wire.REGION_INFO_FORM.pack(info))
            channel.send(Message(reply.id, reply.command, reply.payload, (fd,), reply.flags))
            return True
        reads.append(message.command)
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    bar = function.bar(0)
    assert bar.pointer
    assert bar.read(8, 4) == 0xCAFEF00D
    bar.write(12, 2, 0xBEEF)
    assert os.pread(fd, 2, PAGE + 12) == b"\xef\xbe"
    assert Command.REGION_READ not in reads
    function.close()
    assert not Path("/proc/self/maps").read_text().count("guestpv-test-bar")
    with pytest.raises(DeviceGone):
        bar.read(8, 4)
    os.close(fd)


def test_a_server_without_reset_and_with_a_request_interrupt(scripted: Callable[[Script], str]) -> None:
    theirs: list[int] = []

    def script(channel: Channel, message: Message) -> bool:
        theirs.extend(message.fds)
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    assert function.reset() is False
    assert function.msix_vectors == 0
    assert function.error_fd() is None
    request = function.request_fd()
    assert request is not None
    assert function.request_fd() == request
    os.eventfd_write(theirs[0], 1)
    assert fired(request)
    with pytest.raises(UsageError, match="no legacy interrupt"):
        function.enable_intx()
    with pytest.raises(UsageError, match="1 of 0 MSI-X vectors"):
        function.enable_msix(1)
    function.close()
    close_all(theirs)


def test_vectors_are_sent_in_as_many_messages_as_the_server_needs(scripted: Callable[[Script], str]) -> None:
    sets: list[tuple[int, int, int]] = []

    def script(channel: Channel, message: Message) -> bool:
        if message.command == Command.DEVICE_SET_IRQS:
            action = wire.IRQ_SET_FORM.unpack(message.payload)
            sets.append((action.start, action.count, len(message.fds)))
            message.close_fds()
        if message.command == Command.VERSION:
            channel.send(message.answer(wire.VERSION_FORM.pack(Version(0, 1, {"max_msg_fds": 2}))))
            return True
        if message.command == Command.DEVICE_GET_IRQ_INFO:
            channel.send(message.answer(wire.IRQ_INFO_FORM.pack(wire.IrqInfo(16, 1, 2, 8))))
            return True
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    assert len(set(function.enable_msix(5))) == 5
    assert sets == [(0, 2, 2), (2, 2, 2), (4, 1, 1)]
    function.close()


def test_a_servers_own_commands_are_refused_and_do_no_harm(scripted: Callable[[Script], str]) -> None:
    refusals: list[int] = []

    def script(channel: Channel, message: Message) -> bool:
        if message.command == Command.REGION_READ:
            channel.send(Message(77, Command.DMA_READ, bytes(16)))
            reply = channel.receive()
            assert (reply.id, reply.command) == (77, Command.DMA_READ)
            refusals.append(reply.errno)
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    assert function.config_read(0, 4) == 0x03020100
    assert refusals == [ENOTSUP]
    function.close()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda m: Message(m.id + 1, m.command, flags=wire.TYPE_REPLY), GuestpvError, "number 2 is one to"),
        (lambda m: Message(m.id, 5, flags=wire.TYPE_REPLY), GuestpvError, "command 5"),
        (lambda m: m.answer(bytes(3)), GuestpvError, "DeviceInfo has 3 bytes where 16 belong"),
        (lambda m: m.answer(bytes(16)), GuestpvError, "no PCI device"),
        (lambda m: m.refuse(EINVAL), CommandRefused, "refused DEVICE_GET_INFO: Invalid argument"),
        (lambda m: m.refuse(0), CommandRefused, "no reason given"),
        (
            lambda m: Message(m.id, m.command, bytes(16), (0,), wire.TYPE_REPLY),
            GuestpvError,
            "1 descriptors came",
        ),
    ],
)
def test_answers_that_make_no_sense(
    scripted: Callable[[Script], str],
    wrong: Callable[[Message], Message],
    error: type[GuestpvError],
    text: str,
) -> None:
    def script(channel: Channel, message: Message) -> bool:
        if message.command != Command.DEVICE_GET_INFO:
            return ordinary(channel, message)
        channel.send(wrong(message))
        return True

    with pytest.raises(error, match=text):
        VfioUserFunction(scripted(script))


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (Version(1, 0, {}), "protocol version 1.0, 0.1 was proposed"),
        (Version(0, 2, {}), "protocol version 0.2"),
        (Version(0, 1, {"max_msg_fds": "many"}), "max_msg_fds is 'many'"),
    ],
)
def test_versions_that_do_not_fit(scripted: Callable[[Script], str], version: Version, text: str) -> None:
    def script(channel: Channel, message: Message) -> bool:
        channel.send(message.answer(wire.VERSION_FORM.pack(version)))
        return True

    with pytest.raises(GuestpvError, match=text):
        VfioUserFunction(scripted(script))


def test_a_server_that_speaks_something_else(tmp_path: Path) -> None:
    path = str(tmp_path / "chat.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def chat() -> None:
            with listener.accept()[0] as client:
                client.sendall(b"220 mail.example ready, at your service\r\n")

        thread = threading.Thread(target=chat)
        thread.start()
        # It may hang up before it is greeted.
        with pytest.raises(GuestpvError, match=r"does not speak vfio-user|no vfio-user server"):
            VfioUserFunction(path)
        thread.join()


def test_a_server_that_falls_silent_is_given_up(scripted: Callable[[Script], str]) -> None:
    over = threading.Event()

    def script(channel: Channel, message: Message) -> bool:
        if message.command == Command.REGION_READ:
            over.wait(60)
            return False
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    channel = function.session._channel
    assert channel is not None
    channel.timeout = 0.2
    channel._socket.settimeout(0.2)
    with pytest.raises(TimeLimit, match=r"sent nothing for 0\.2 s") as caught:
        function.config_read(0, 2)
    assert "REGION_READ" in caught.value.hint
    with pytest.raises(DeviceGone, match="connection is closed"):
        function.config_read(0, 2)
    function.close()
    over.set()


def test_a_server_that_dies_in_the_middle(serve: Serve) -> None:
    server = serve("net?peer=sink")
    transport = opened(server)
    net = Net(transport)
    server.close()
    with pytest.raises(DeviceGone):
        net.send([bytes(60)])
    with pytest.raises(DeviceGone):
        transport.read_status()
    before = descriptors()
    net.close()
    assert descriptors() < before
    transport.function.close()


def test_a_client_that_dies_in_the_middle_of_a_message(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    server = serve(tell=said.append)
    with monkeypatch.context() as patch:
        patch.setattr("guestpv.serve.vfio_user.MESSAGE_SECONDS", 0.1)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(server.path)
        sock.sendall(wire.HEADER.pack(1, Command.VERSION, 100, 0, 0)[:9])
        until(lambda: any("sent nothing for 0.1 s" in text for text in said))
        sock.close()
    with opened(server) as transport, Rng(transport) as rng:
        assert len(rng.read(8)) == 8


LIKELY = [0, 1, 2, 4, 7, 20, 32, 33, 36, PAGE]
"""Lengths, flags, indexes and counts that nearly make sense."""


def test_random_messages_harm_nobody(serve: Serve, memory: int) -> None:
    server = serve("net", findings=True)
    dice = random.Random(7)
    event = eventfd()
    before = descriptors()
    for _ in range(40):
        channel = connected(server)
        for number in range(60):
            command = dice.choice([*wire.EXCHANGES, dice.randrange(70)])
            size = wire.EXCHANGES[command].sends.size if command in wire.EXCHANGES else 0
            words = [dice.choice([*LIKELY, dice.getrandbits(32)]) for _ in range(size // 4)]
            payload = struct.pack(f"<{len(words)}I", *words) + dice.randbytes(dice.choice([0, 0, 1, 4]))
            fds = dice.choice([(), (), (memory,), (event,), (0, memory)])
            channel.send(Message(number, command, payload, fds))
            reply = channel.receive()
            assert (reply.id, reply.command, reply.is_reply) == (number, command, True)
        channel.close()
        until(lambda: server.connection is None)
    assert descriptors() == before
    assert mappings() == 0
    os.close(event)
    with opened(server) as transport, Net(transport) as net:
        assert net.send([bytes(60)]) == 1


def test_where_it_listens(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    with pytest.raises(UsageError, match="somebody listens there already"):
        VfioUserServer(make_function("rng"), server.path)
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(UsageError, match="no socket"):
        VfioUserServer(make_function("rng"), str(file))
    assert file.read_text() == "precious"
    with pytest.raises(UsageError, match="cannot listen: No such file or directory"):
        VfioUserServer(make_function("rng"), str(tmp_path / "no" / "where"))
    with pytest.raises(UsageError, match="cannot listen: AF_UNIX path too long"):
        VfioUserServer(make_function("rng"), "/" + "x" * 200)
    left_behind = str(tmp_path / "left.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(left_behind)
    with VfioUserServer(make_function("rng"), left_behind) as fresh, opened(fresh) as transport:
        assert transport.device_type == 4
