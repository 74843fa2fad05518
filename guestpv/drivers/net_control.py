"""The control queue of a network device (5.1.9.5): one command at a time, each with its answer.

Every method is one command or a few. A command that the device refuses raises ``CommandRefused``, one that
it does not answer ``TimeLimit``; after that the queue takes no more until the answer has come, because its
memory is still the device's.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..errors import DeviceViolation, GuestpvError, TimeLimit, UsageError
from ..memory import DmaBuffer
from ..spec import net as spec
from ..spec.features import NET as NET_DEVICE
from ..spec.features import feature_name, feature_names, mask
from ..transport.base import Transport
from .net_config import NetConfig

TIME_LIMIT: Final = 10.0
WAIT: Final = 0.5
"""Seconds between looks at the device's status while an answer is awaited."""
UNANSWERED: Final = 0xFF
MODES: Final = {
    "promisc": spec.CTRL_RX_PROMISC,
    "allmulti": spec.CTRL_RX_ALLMULTI,
    "alluni": spec.CTRL_RX_ALLUNI,
    "nomulti": spec.CTRL_RX_NOMULTI,
    "nouni": spec.CTRL_RX_NOUNI,
    "nobcast": spec.CTRL_RX_NOBCAST,
}
"""Receive modes by name; those from ``alluni`` on need CTRL_RX_EXTRA (5.1.9.5.1)."""


class CommandRefused(GuestpvError):
    """The device answered a control command with VIRTIO_NET_ERR.

    Attributes:
        kind, command: class and command of what it refused.
    """

    code = "control-refused"

    def __init__(self, kind: int, command: int, where: str) -> None:
        super().__init__(
            f"the device refused the control command {spec.command_name(kind, command)}", where=where
        )
        self.kind = kind
        self.command = command


@dataclass(frozen=True, slots=True)
class Rss:
    """Receive-side scaling (5.1.9.5.7): which receive queue a packet goes to.

    Attributes:
        key: Toeplitz key, 40 bytes or what the device's ``rss_key_size`` allows.
        table: receive queue numbers from 0, one per hash value modulo its length, a power of two.
        hash_types: mask of ``spec.HASH_TYPES``, those the device has where None is given.
        unclassified: receive queue for packets without a hash.
        transmit_queues: how many transmit queues may be used; as many as pairs where None is given.
    """

    key: bytes
    table: Sequence[int]
    hash_types: int | None = None
    unclassified: int = 0
    transmit_queues: int | None = None

    @classmethod
    def even(cls, key: bytes, pairs: int, entries: int = spec.RSS_TABLE_MIN) -> Rss:
        """All hash values spread over ``pairs`` receive queues in turn."""
        return cls(key, [n % pairs for n in range(entries)])


@dataclass(frozen=True, slots=True)
class Coalescing:
    """When a queue notifies: after so many packets or microseconds, whichever comes first; 0: at once."""

    packets: int
    microseconds: int


class ControlQueue:
    """Commands to a network device; used by the thread that made it.

    Args:
        transport: the negotiated device, before DRIVER_OK.
        config: what the device says of itself.
        index: number of the control queue.
        pairs: queue pairs that are enabled.
        timeout: seconds that the device may take to answer.
    """

    def __init__(
        self,
        transport: Transport,
        config: NetConfig,
        index: int,
        pairs: int,
        timeout: float = TIME_LIMIT,
    ) -> None:
        self.queue = transport.make_queue(index)
        self.timeout = timeout
        self._transport = transport
        self._config = config
        self._pairs = pairs
        self._memory = transport.pool.allocate(4096)
        self._unanswered = ""

    # One command.

    def command(
        self, kind: int, command: int, data: bytes = b"", *, before: int = 0, after: int = 0
    ) -> bytes:
        """Send a command and wait for its answer (5.1.9.5).

        Args:
            kind: class.
            command: number within the class.
            data: what the device reads behind class and command.
            before: bytes that the device writes in front of its status.
            after: most bytes that it writes behind it.

        Returns:
            What the device wrote: ``before`` bytes, then at most ``after``.

        Raises:
            CommandRefused: its status is VIRTIO_NET_ERR.
            DeviceViolation: its status does not exist, or it wrote less than a status.
            TimeLimit: it did not answer, or has not yet answered the command before.
        """
        name = spec.command_name(kind, command)
        self._settle(0.0)
        status_at = 2 + len(data) + before
        memory = self._room(status_at + 1 + after)
        memory.write(bytes((kind, command)) + data + bytes(before))
        # What the device does not write must not look like an answer.
        memory.array[status_at] = UNANSWERED
        memory.array[status_at + 1 : status_at + 1 + after] = 0
        head = 2 + len(data)
        readable = [memory[:2]] + ([memory[2:head]] if data else [])
        writable = [memory[a:b] for a, b in ((head, status_at), (status_at, status_at + 1)) if b > a]
        if after:
            writable.append(memory[status_at + 1 : status_at + 1 + after])
        self.queue.add(readable=readable, writable=writable)
        self.queue.publish()
        self._unanswered = name
        length = self._settle(self.timeout)
        status = int(memory.array[status_at])
        if status == spec.CTRL_ERR:
            raise CommandRefused(kind, command, self._transport.name)
        if status != spec.CTRL_OK:
            text = "no status" if status == UNANSWERED else f"the status {status}, which does not exist"
            raise DeviceViolation(
                f"the device answered the control command {name} with {text}",
                requirement="DEV-NET-223",
                section="5.1.9.5",
                where=self._transport.name,
            )
        written = max(0, min(length - before - 1, after))
        return bytes(memory.array[head:status_at]) + bytes(memory.array[status_at + 1 :][:written])

    def _settle(self, timeout: float) -> int:
        """Take the outstanding answer; its length in bytes, 0 where none is outstanding."""
        if not self._unanswered:
            return 0
        if not self._wait(timeout):
            late = "was not answered within" if timeout else "is still not answered after"
            raise TimeLimit(
                f"the control command {self._unanswered} {late} {self.timeout:g} s",
                where=self._transport.name,
                hint="the device's control queue hangs: look at the hypervisor's log",
            )
        ((_token, length),) = list(self.queue.completions())
        self._unanswered = ""
        return length

    def _wait(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not self.queue.wait(min(WAIT, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
            # A device that needs a reset answers nothing: no reason to wait for long.
            self._transport.check_live()
        return True

    def _room(self, size: int) -> DmaBuffer:
        if self._memory.nbytes < size:
            self._transport.pool.free(self._memory)
            self._memory = self._transport.pool.allocate(-(-size // 4096) * 4096)
        return self._memory

    def free(self) -> None:
        """Give its memory back. Only after the device was reset."""
        self._transport.pool.free(self._memory)

    def _need(self, *bits: int) -> None:
        for bit in bits:
            if not self._transport.has(bit):
                raise UsageError(
                    f"{feature_name(NET_DEVICE, bit)} was not negotiated", where=self._transport.name
                )

    def _check(self, holds: bool, message: str) -> None:
        if not holds:
            raise UsageError(message, where=self._transport.name)

    # Queues and steering (5.1.9.5.5 to 5.1.9.5.7).

    def set_pairs(self, pairs: int) -> None:
        """Use so many queue pairs, all of which have to be enabled; steering is the device's.

        Raises:
            UsageError: MQ was not negotiated, or there are fewer pairs (DRV-NET-101, DRV-NET-102).
        """
        self._need(spec.F_MQ)
        self._check(1 <= pairs <= self._pairs, f"{pairs} queue pairs, enabled are {self._pairs}")
        self.command(spec.CTRL_MQ, spec.CTRL_MQ_VQ_PAIRS_SET, pairs.to_bytes(2, "little"))

    def set_rss(self, rss: Rss) -> None:
        """Steer received packets by their hash.

        Raises:
            UsageError: RSS was not negotiated, or the device cannot do what ``rss`` says.
        """
        self._need(spec.F_RSS)
        length, table = len(rss.table), [rss.unclassified, *rss.table]
        most = self._config.rss_table_length
        self._check(
            0 < length <= most and not length & (length - 1),
            f"an indirection table of {length} entries is no power of two up to {most}",
        )
        worst = max(table, key=lambda queue: queue if queue >= 0 else 1 << 16)
        self._check(0 <= worst < self._pairs, f"there is no receive queue {worst}: enabled are {self._pairs}")
        transmit = self._pairs if rss.transmit_queues is None else rss.transmit_queues
        self._check(1 <= transmit <= self._pairs, f"{transmit} transmit queues, enabled are {self._pairs}")
        types = self._hash_types(rss.hash_types)
        self.command(
            spec.CTRL_MQ,
            spec.CTRL_MQ_RSS_CONFIG,
            struct.pack("<IH", types, length - 1)
            + np.array(table, "<u2").tobytes()
            + struct.pack("<H", transmit)
            + self._key(rss.key),
        )

    def set_hash(self, key: bytes, hash_types: int | None = None) -> None:
        """Choose what hash is reported with received packets, without RSS.

        Args:
            key: Toeplitz key.
            hash_types: mask of ``spec.HASH_TYPES``; None for all that the device has.

        Raises:
            UsageError: HASH_REPORT was not negotiated, or the device does not have these types.
        """
        self._need(spec.F_HASH_REPORT)
        types = self._hash_types(hash_types)
        self.command(spec.CTRL_MQ, spec.CTRL_MQ_HASH_CONFIG, struct.pack("<I8x", types) + self._key(key))

    def set_hash_tunnels(self, types: int) -> None:
        """Hash over the inner header of these encapsulations (5.1.9.4.4); 0 for none."""
        self._need(spec.F_HASH_TUNNEL)
        self._check(not types & ~self._config.tunnel_types, f"tunnel types {types:#x} are not all supported")
        self.command(spec.CTRL_HASH_TUNNEL, spec.CTRL_HASH_TUNNEL_SET, struct.pack("<I", types))

    def _hash_types(self, wanted: int | None) -> int:
        supported = self._config.hash_types
        if wanted is None:
            return supported
        missing = [name for name, bit in spec.HASH_TYPES.items() if wanted & ~supported & bit]
        self._check(
            not wanted & ~supported, f"the device has no hash over {' '.join(missing) or hex(wanted)}"
        )
        return wanted

    def _key(self, key: bytes) -> bytes:
        most = self._config.rss_key_size
        self._check(0 < len(key) <= most, f"a hash key of {len(key)} bytes, the device takes 1 to {most}")
        return bytes((len(key),)) + key

    # The receive filter (5.1.9.5.1 to 5.1.9.5.3).

    def set_mode(self, name: str, on: bool) -> None:
        """Turn a receive mode on or off: promisc, allmulti, alluni, nomulti, nouni, nobcast."""
        self._check(name in MODES, f"no receive mode is called {name!r}: {' '.join(MODES)}")
        extra = MODES[name] > spec.CTRL_RX_ALLMULTI
        self._need(spec.F_CTRL_RX_EXTRA if extra else spec.F_CTRL_RX)
        self.command(spec.CTRL_RX, MODES[name], bytes((on,)))

    def set_mac(self, mac: bytes) -> None:
        """Make ``mac``, 6 bytes, the device's own address."""
        self._need(spec.F_CTRL_RX, spec.F_CTRL_MAC_ADDR)
        self._check(len(mac) == 6 and not mac[0] & 1, f"{mac.hex(':')} is no unicast address")
        self.command(spec.CTRL_MAC, spec.CTRL_MAC_ADDR_SET, mac)

    def set_filter(self, unicast: Iterable[bytes] = (), multicast: Iterable[bytes] = ()) -> None:
        """Receive packets to these addresses besides the device's own, and to no others any more."""
        self._need(spec.F_CTRL_RX)
        data = b""
        for addresses, bit in ((list(unicast), 0), (list(multicast), 1)):
            for mac in addresses:
                kind = "multicast" if bit else "unicast"
                self._check(len(mac) == 6 and mac[0] & 1 == bit, f"{mac.hex(':')} is no {kind} address")
            data += len(addresses).to_bytes(4, "little") + b"".join(addresses)
        self.command(spec.CTRL_MAC, spec.CTRL_MAC_TABLE_SET, data)

    def add_vlan(self, vlan: int) -> None:
        """Receive packets with this VLAN id, 0 to 4095."""
        self._vlan(spec.CTRL_VLAN_ADD, vlan)

    def remove_vlan(self, vlan: int) -> None:
        """Receive no more packets with this VLAN id."""
        self._vlan(spec.CTRL_VLAN_DEL, vlan)

    def _vlan(self, command: int, vlan: int) -> None:
        self._need(spec.F_CTRL_VLAN)
        self._check(0 <= vlan < 4096, f"{vlan} is no VLAN id")
        self.command(spec.CTRL_VLAN, command, vlan.to_bytes(2, "little"))

    # The rest (5.1.9.5.4, 5.1.9.5.9 to 5.1.9.5.11).

    def acknowledge_announce(self) -> None:
        """Say that the request to announce ourselves was seen."""
        self._need(spec.F_GUEST_ANNOUNCE)
        self.command(spec.CTRL_ANNOUNCE, spec.CTRL_ANNOUNCE_ACK)

    def set_offloads(self, offloads: int) -> None:
        """Have these receive offloads, a mask of feature bits, and no others, until told otherwise.

        Raises:
            UsageError: one of them was not negotiated (DRV-NET-114).
        """
        self._need(spec.F_CTRL_GUEST_OFFLOADS)
        have = self._transport.features & mask(spec.RECEIVE_OFFLOADS)
        wrong = feature_names(NET_DEVICE, offloads & ~have)
        self._check(not wrong, f"{' '.join(wrong)}: not receive offloads that were negotiated")
        self.command(spec.CTRL_GUEST_OFFLOADS, spec.CTRL_GUEST_OFFLOADS_SET, offloads.to_bytes(8, "little"))

    def set_coalescing(self, way: str, value: Coalescing) -> None:
        """Moderate notifications of all receive (``rx``) or transmit (``tx``) queues."""
        self._need(spec.F_NOTF_COAL)
        command = {"rx": spec.CTRL_NOTF_COAL_RX_SET, "tx": spec.CTRL_NOTF_COAL_TX_SET}.get(way)
        if command is None:
            raise UsageError(f"{way!r} is neither rx nor tx", where=self._transport.name)
        self.command(spec.CTRL_NOTF_COAL, command, self._coalescing(value))

    def set_queue_coalescing(self, queue: int, value: Coalescing) -> None:
        """Moderate notifications of one receive or transmit queue, by its virtqueue number."""
        self.command(
            spec.CTRL_NOTF_COAL,
            spec.CTRL_NOTF_COAL_VQ_SET,
            self._data_queue(queue) + self._coalescing(value),
        )

    def queue_coalescing(self, queue: int) -> Coalescing:
        """How notifications of one receive or transmit queue are moderated."""
        answer = self.command(
            spec.CTRL_NOTF_COAL, spec.CTRL_NOTF_COAL_VQ_GET, self._data_queue(queue), before=8
        )
        return Coalescing(*struct.unpack("<II", answer))

    def _data_queue(self, queue: int) -> bytes:
        self._need(spec.F_VQ_NOTF_COAL)
        self._check(0 <= queue < 2 * self._pairs, f"virtqueue {queue} is no enabled data queue")
        return struct.pack("<H2x", queue)

    def _coalescing(self, value: Coalescing) -> bytes:
        for number in (value.packets, value.microseconds):
            self._check(0 <= number < 1 << 32, f"{number} is not between 0 and 2^32")
        return struct.pack("<II", value.packets, value.microseconds)

    def statistics(self) -> dict[int, dict[str, int]]:
        """The device's own counters of every enabled queue: virtqueue number -> name -> value.

        Raises:
            DeviceViolation: the answer does not add up.
        """
        self._need(spec.F_DEVICE_STATS)
        answer = self.command(spec.CTRL_STATS, spec.CTRL_STATS_QUERY, after=8)
        types = int.from_bytes(answer, "little")
        rx, tx = (sum(1 << n for n in spec.STATS if low <= n < low + 16) for low in (0, 16))
        wanted = {self.queue.index: types & 1 << 32}
        for pair in range(self._pairs):
            wanted |= {2 * pair: types & rx, 2 * pair + 1: types & tx}
        wanted = {queue: bitmap for queue, bitmap in wanted.items() if bitmap}
        if not wanted:
            return {}
        room = sum(
            spec.STATS_HEADER.itemsize + 8 * len(names)
            for bitmap in wanted.values()
            for number, names in spec.STATS.items()
            if bitmap >> number & 1
        )
        data = b"".join(struct.pack("<H6xQ", queue, bitmap) for queue, bitmap in wanted.items())
        return self._replies(self.command(spec.CTRL_STATS, spec.CTRL_STATS_GET, data, after=room), wanted)

    def _replies(self, answer: bytes, wanted: dict[int, int]) -> dict[int, dict[str, int]]:
        found: dict[int, dict[str, int]] = {queue: {} for queue in wanted}
        start, size = 0, spec.STATS_HEADER.itemsize
        while start + size <= len(answer):
            header = np.frombuffer(answer, spec.STATS_HEADER, 1, start)[0]
            queue, kind, length = (int(header[name]) for name in ("vq_index", "type", "size"))
            if length < size or start + length > len(answer) or not wanted.get(queue, 0) >> kind & 1:
                raise DeviceViolation(
                    f"statistics of type {kind} for queue {queue}, {length} bytes, were not asked for or do "
                    "not fit",
                    requirement="DEV-NET-138",
                    section="5.1.9.5.11.2",
                    where=self._transport.name,
                )
            # A device may know fewer counters of a type than this list, or more.
            values = np.frombuffer(answer, "<u8", (length - size) // 8, start + size)
            found[queue] |= {name: int(v) for name, v in zip(spec.STATS[kind], values, strict=False)}
            start += length
        return found
