"""The worlds: where a device of each type can be had, and with which rings."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import guestpv
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.blk import Blk as BlkModel
from guestpv.devices.models.blk_store import Store
from guestpv.devices.models.net import Net as NetModel
from guestpv.devices.models.rng import Rng as RngModel
from guestpv.devices.models.wire import echo
from guestpv.pci.qemu import DEFAULT_EXECUTABLE
from guestpv.pci.qtest import QtestFunction
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.serve.vhost_user import VhostUserServer
from guestpv.spec.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED, feature_bit, mask
from guestpv.spec.status import Status
from guestpv.transport.base import Transport
from guestpv.transport.pci import PciTransport
from peers import tree
from peers.backend import dpdk_vhost, qemu_to_join, storage_daemon

from .bodies import BODIES, SMALL_RINGS, Place

DISK = 1 << 20
QUEUES = 4
PAIRS = 3
DEVICES = ("rng", "net", "blk")
OFFER = {"packed": "on", "in_order": "on"}
"""What our own devices offer only when asked to."""
RINGS = ("ring_packed", "indirect_desc", "event_idx", "in_order")


@dataclass(frozen=True)
class Ring:
    """Which ring features are to be negotiated, no more and no less."""

    packed: bool = False
    indirect: bool = True
    event_idx: bool = True
    in_order: bool = False

    @property
    def id(self) -> str:
        """For the name of a case."""
        words = {"indirect": self.indirect, "event_idx": self.event_idx, "in_order": self.in_order}
        return "-".join(["packed" if self.packed else "split", *(word for word, on in words.items() if on)])

    @property
    def wishes(self) -> str:
        """As the opener's ``features``."""
        on = (self.packed, self.indirect, self.event_idx, self.in_order)
        return ",".join(f"{'+' if there else '-'}{name}" for name, there in zip(RINGS, on, strict=True))

    def check(self, transport: Transport) -> None:
        """It is what was negotiated."""
        bits = (F_RING_PACKED, F_INDIRECT_DESC, F_EVENT_IDX, F_IN_ORDER)
        found = [transport.has(bit) for bit in bits]
        assert found == [self.packed, self.indirect, self.event_idx, self.in_order]


class World(Protocol):
    """One case: a device type, in one scheme, with one set of options."""

    @property
    def id(self) -> str:
        """Name of the case."""
        ...

    @property
    def device(self) -> str:
        """``rng``, ``net`` or ``blk``."""
        ...

    def place(self, directory: Path) -> AbstractContextManager[Place]:
        """The device, set up; what must have held is checked when it ends."""
        ...


def cases(worlds: Sequence[World]) -> list[tuple[Callable[[Place], None], World]]:
    """Every body of every world's device."""
    return [(body, world) for world in worlds for body in BODIES[world.device]]


def case_id(value: object) -> str:
    """The name of a body or of a world."""
    return str(getattr(value, "__name__", None) or getattr(value, "id", value))


def empty_disk(directory: Path) -> Path:
    """A file of zeroes."""
    path = directory / "disk"
    path.write_bytes(bytes(DISK))
    return path


def own_params(disk: Path) -> dict[str, dict[str, str]]:
    """Parameters of our own devices, by device type."""
    return {
        "rng": {"seed": "1"},
        "net": {"pairs": str(PAIRS)},
        "blk": {"file": str(disk), "num_queues": str(QUEUES)},
    }


def opener(spec: str, ring: Ring, **params: str) -> Callable[[], Transport]:
    """``guestpv.open`` with parameters."""
    return lambda: guestpv.open(f"{spec}?{urlencode({'features': ring.wishes} | params)}")


# loopback:


@dataclass(frozen=True)
class Loopback:
    """Our own device half in this process; at the end it has nothing to say against the driver."""

    device: str
    ring: Ring
    params: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        more = "".join(f"-{name}={value}" for name, value in self.params.items())
        return f"loopback-{self.device}-{self.ring.id}{more}"

    @contextmanager
    def place(self, directory: Path) -> Iterator[Place]:
        functions: list[SoftwareFunction] = []
        path = empty_disk(directory)
        own = own_params(path)
        params = own[self.device] | self.params
        open_ = opener(f"loopback:{self.device}", self.ring, **OFFER | params)

        def start() -> Transport:
            transport = open_()
            assert isinstance(transport, PciTransport)
            assert isinstance(transport.function, SoftwareFunction)
            functions.append(transport.function)
            return transport

        yield Place(
            start,
            self.ring.check,
            stored=path.read_bytes,
            queues=QUEUES,
            pairs=PAIRS,
            small_rings=SMALL_RINGS[self.ring.packed],
        )
        assert functions
        for function in functions:
            assert [str(finding) for finding in function.findings] == []


QEMU_RINGS = [Ring(*on) for on in itertools.product((False, True), repeat=3)]
"""What can be chosen where IN_ORDER is not offered."""
ALL_RINGS = [Ring(*on) for on in itertools.product((False, True), repeat=4)]
WAYS = (
    {"msix": "off"},
    {"msix": "1"},
    {"msix": "2"},
    {"multiplier": "0"},
    {"notification_data": "on"},
    {"threaded": "on"},
    {"queue_size": "32768"},
)
LOOPBACK: list[World] = [
    *[Loopback(device, ring) for device in DEVICES for ring in ALL_RINGS],
    *[Loopback(device, Ring(packed), way) for device in DEVICES for packed in (False, True) for way in WAYS],
]


# Our own servers, behind a socket.


def echoing() -> NetModel:
    """A network device that sends every frame back."""
    model = NetModel(bytes.fromhex("525400000001"), pairs=PAIRS)
    echo(model)
    return model


@dataclass(frozen=True)
class OwnVfioUser:
    """Our vfio-user server and our vfio-user client."""

    device: str
    ring: Ring
    mode: str

    @property
    def id(self) -> str:
        return f"vfio_user-{self.device}-{self.ring.id}-{self.mode}"

    @contextmanager
    def place(self, directory: Path) -> Iterator[Place]:
        path = empty_disk(directory)
        own = own_params(path)
        function = make_function(f"{self.device}?{urlencode(OFFER | own[self.device])}")
        with VfioUserServer(function, str(directory / "vfio.sock")) as server:
            yield Place(
                opener(f"vfio-user:{server.path}", self.ring, mode=self.mode),
                self.ring.check,
                stored=path.read_bytes,
                queues=QUEUES,
                pairs=PAIRS,
                small_rings=SMALL_RINGS[self.ring.packed],
            )
            assert [str(finding) for finding in function.findings] == []


@dataclass(frozen=True)
class OwnVhostUser:
    """Our vhost-user back end and our front end."""

    device: str
    ring: Ring
    mode: str

    @property
    def id(self) -> str:
        return f"vhost_user-{self.device}-{self.ring.id}-{self.mode}"

    @contextmanager
    def place(self, directory: Path) -> Iterator[Place]:
        path = empty_disk(directory)
        models = {
            "rng": lambda: RngModel(1),
            "net": echoing,
            "blk": lambda: BlkModel(Store(str(path)), num_queues=QUEUES),
        }
        path_of_socket = str(directory / "vhost.sock")
        offer = mask([F_RING_PACKED])
        with VhostUserServer(models[self.device](), path_of_socket, offer=offer) as server:
            yield Place(
                opener(f"vhost-user:{self.device}:{path_of_socket}", self.ring, mode=self.mode),
                self.ring.check,
                stored=path.read_bytes,
                queues=QUEUES,
                pairs=PAIRS,
                small_rings=SMALL_RINGS[self.ring.packed],
            )
            assert [str(finding) for finding in server.journal.findings] == []


SOCKET_RINGS = [Ring(packed, event_idx=event_idx) for packed in (False, True) for event_idx in (False, True)]
VFIO_USER: list[World] = [
    OwnVfioUser(device, ring, mode)
    for device in DEVICES
    for ring, mode in [*[(ring, "msix") for ring in SOCKET_RINGS], (Ring(), "intx"), (Ring(True), "poll")]
]
VHOST_USER: list[World] = [
    OwnVhostUser(device, ring, mode) for device in DEVICES for ring in QEMU_RINGS for mode in ("msix", "poll")
]


# Back ends of others.


@dataclass(frozen=True)
class StorageDaemon:
    """qemu-storage-daemon's vhost-user disk."""

    ring: Ring
    mode: str
    device: str = "blk"

    @property
    def id(self) -> str:
        return f"storage_daemon-{self.ring.id}-{self.mode}"

    @contextmanager
    def place(self, directory: Path) -> Iterator[Place]:
        path = empty_disk(directory)
        node = f"driver=file,filename={path},aio=threads"
        with storage_daemon(directory / "blk.sock", node, queues=QUEUES) as backend:
            open_ = opener(f"vhost-user:blk:{backend.socket}", self.ring, mode=self.mode)
            yield Place(open_, self.ring.check, stored=path.read_bytes, queues=QUEUES)


@dataclass(frozen=True)
class Dpdk:
    """DPDK's vhost port, which sends every frame back with its addresses exchanged."""

    ring: Ring
    mergeable: bool
    device: str = "net"

    @property
    def id(self) -> str:
        return f"dpdk-{self.ring.id}{'-mergeable' if self.mergeable else ''}"

    @contextmanager
    def place(self, directory: Path) -> Iterator[Place]:
        wishes = f"{self.ring.wishes},{'+' if self.mergeable else '-'}mrg_rxbuf"
        with dpdk_vhost(directory / "net.sock", tree.get("peers"), queues=PAIRS) as backend:
            yield Place(
                opener(f"vhost-user:net:{backend.socket}", self.ring, features=wishes),
                self.ring.check,
                returned=lambda frame: frame[6:12] + frame[:6] + frame[12:],
                pairs=PAIRS,
            )


PAIRWISE = ((False, False, False), (False, True, True), (True, False, True), (True, True, False))
"""Any two of three switches in every combination; a testpmd takes seconds to start."""
PEERS: list[World] = [
    *[
        StorageDaemon(Ring(indirect=indirect, event_idx=event_idx), mode)
        for indirect, event_idx, mode in itertools.product((False, True), (False, True), ("msix", "poll"))
    ],
    *[
        Dpdk(Ring(packed, event_idx=event_idx, in_order=in_order), packed)
        for packed, event_idx, in_order in PAIRWISE
    ],
]


# QEMU.


class Returner:
    """The far end of a cable of datagrams, which sends every frame back.

    Attributes:
        device, wire: paths of the two ends' sockets.
        netdev: QEMU's ``-netdev`` option for the device's end.
    """

    def __init__(self, directory: Path) -> None:
        self.device, self.wire = str(directory / "device"), str(directory / "wire")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.wire)
        self.netdev = f"dgram,local.type=unix,local.path={self.device},remote.type=unix"
        self.netdev += f",remote.path={self.wire},id=net"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while frame := self._socket.recv(1 << 17):
            try:
                self._socket.sendto(frame, self.device)
            except OSError:
                # Between two lives of the device nobody listens.
                continue

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self.wire)
        self._thread.join()
        self._socket.close()


STATUS_ABORTS = (11, 0, 0)
"""From here on x-query-virtio-status may end QEMU by an assertion of its own (seen with 11.1.3)."""


def qemus_view(transport: Transport) -> None:
    """QEMU's own opinion of a live device agrees with ours; it owes nothing to our registers and rings."""
    assert isinstance(transport, PciTransport)
    assert isinstance(transport.function, QtestFunction)
    if transport.function.machine.qemu.version >= STATUS_ABORTS:
        return
    qmp, path = transport.function.machine.qemu.qmp, {"path": "/machine/peripheral/dev/virtio-backend"}
    seen: dict[str, Any] = qmp.execute("x-query-virtio-status", path)
    said = seen["guest-features"]
    accepted = said.get("unknown-dev-features", 0)
    for line in said["transports"] + said["dev-features"]:
        accepted |= 1 << feature_bit(transport.device_type, line.split(":")[0])
    assert accepted == transport.features
    status = Status(0)
    for line in seen["status"]["statuses"]:
        status |= Status[line.split(":")[0].removeprefix("VIRTIO_CONFIG_S_")]
    assert status == transport.status
    assert not seen["broken"]
    for index, queue in transport.queues.items():
        told = qmp.execute("x-query-virtio-queue-status", {**path, "queue": index})
        at = queue.addresses
        assert told["vring-num"] == queue.size
        assert (told["vring-desc"], told["vring-avail"], told["vring-used"]) == (
            at.desc,
            at.driver,
            at.device,
        )


@dataclass(frozen=True)
class Qtest:
    """A device of QEMU, without a guest; a fresh QEMU for each opening."""

    device: str
    ring: Ring
    machine: str = "q35"
    mode: str = "msix"
    iothread: bool = False
    peer: str = ""
    """Another QEMU than the machine's own: a tree of ``peers``."""

    @property
    def id(self) -> str:
        more = "-iothread" if self.iothread else ""
        more += f"-{self.peer}" if self.peer else ""
        return f"qtest-{self.device}-{self.machine}-{self.ring.id}-{self.mode}{more}"

    @contextmanager
    def place(self, directory: Path) -> Iterator[Place]:
        own = os.environ.get("GUESTPV_QEMU", DEFAULT_EXECUTABLE)
        params = {
            "qemu": str(tree.get(self.peer).qemu(directory)) if self.peer else own,
            "machine": self.machine,
            "mode": self.mode,
            "features": self.ring.wishes,
        }
        body = f"virtio-{self.device}-pci,disable-legacy=on,id=dev"
        body += ",packed=on" if self.ring.packed else ""
        disk = empty_disk(directory)
        transports: list[Transport] = []
        with ExitStack() as stack:
            if self.device == "blk":
                body += f",num-queues={QUEUES}"
                params["blockdev"] = f"driver=file,filename={disk},aio=threads"
            if self.device == "net":
                cable = Returner(directory)
                stack.callback(cable.close)
                params["netdev"] = cable.netdev
            if self.iothread:
                params["object"] = "iothread"

            def start() -> Transport:
                transports.append(guestpv.open(f"qtest:{quote(body)}?{urlencode(params)}"))
                return transports[-1]

            def live(transport: Transport) -> None:
                self.ring.check(transport)
                qemus_view(transport)

            yield Place(
                start,
                live,
                stored=disk.read_bytes,
                queues=QUEUES,
                small_rings=SMALL_RINGS[self.ring.packed],
            )


@dataclass(frozen=True)
class Joined:
    """A device of a QEMU that runs already and knows nothing of us; each opening joins it anew."""

    device: str
    ring: Ring
    mode: str
    machine: str = "q35"

    @property
    def id(self) -> str:
        return f"joined-{self.device}-{self.machine}-{self.ring.id}-{self.mode}"

    @contextmanager
    def place(self, directory: Path) -> Iterator[Place]:
        disk = empty_disk(directory)
        device = f"virtio-{self.device}-pci,disable-legacy=on,id=dev"
        device += ",packed=on" if self.ring.packed else ""
        options: list[str] = []
        with ExitStack() as stack:
            if self.device == "blk":
                options = ["-blockdev", f"driver=file,filename={disk},aio=threads,node-name=disk"]
                device += f",num-queues={QUEUES},drive=disk"
            if self.device == "net":
                cable = Returner(directory)
                stack.callback(cable.close)
                options = ["-netdev", cable.netdev]
                device += ",netdev=net"
            qtest, monitor = directory / "qtest.sock", directory / "qmp.sock"
            backend = qemu_to_join(
                qtest,
                monitor,
                [*options, "-device", device],
                machine=self.machine,
                memory="memory-backend-memfd,share=on",
                executable=os.environ.get("GUESTPV_QEMU", DEFAULT_EXECUTABLE),
            )
            stack.enter_context(backend)

            def live(transport: Transport) -> None:
                self.ring.check(transport)
                qemus_view(transport)

            yield Place(
                opener("qtest:dev", self.ring, join=str(qtest), qmp=str(monitor), mode=self.mode),
                live,
                stored=disk.read_bytes,
                queues=QUEUES,
                small_rings=SMALL_RINGS[self.ring.packed],
            )


QTEST: list[World] = [
    *[Qtest(device, ring, machine) for device in DEVICES for machine in ("q35", "pc") for ring in QEMU_RINGS],
    *[
        Qtest(device, Ring(packed), mode=mode)
        for device in DEVICES
        for packed in (False, True)
        for mode in ("intx", "poll")
    ],
    *[Qtest("blk", Ring(packed), iothread=True) for packed in (False, True)],
    *[Qtest(device, Ring(packed), peer="qemu-10") for device in DEVICES for packed in (False, True)],
    *[Joined(device, Ring(), "intx") for device in DEVICES],
    *[Joined(device, Ring(True), "poll", "pc") for device in DEVICES],
]
