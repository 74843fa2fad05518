"""The control queue of the network device and the receive filter it steers (5.1.9.5)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ...spec import net
from .net_hash import Steering
from .packet import vlan_id

if TYPE_CHECKING:
    from .net import Net

PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST = range(6)
MAC_TABLE_SET, MAC_ADDR_SET = 0, 1
VLAN_ADD, VLAN_DEL = 0, 1
GUEST_OFFLOADS_SET = 0
BROADCAST = b"\xff" * 6
RECEIVE_OFFLOADS = (1, 7, 8, 9, 10, 46, 47, 54, 55)
"""Bits of the offload command; most are the feature's own number (5.1.9.5.9.1)."""

Result = tuple[bool, str, str]
"""Whether the command was accepted, the broken requirement, if one, and why."""
RX_STATS, TX_STATS, CONTROL_STATS = 1 << 0, 1 << 16, 1 << 32
"""Types of statistics that are kept."""
OK: Result = (True, "", "")


class Control:
    """State behind the control queue; everything as after a reset until a command says otherwise.

    Attributes:
        modes: receive modes that are on (``PROMISC`` ... ``NOBCAST``).
        table: addresses that the driver wants besides its own.
        vlans: VLAN ids that pass, with CTRL_VLAN.
        pairs: queue pairs in use.
        transmits: transmit queues that may be used, and the requirement that says so.
        offloads: receive offloads that are on, a mask of feature bits.
        steering: hash and RSS configuration, None before there is one.
        coalescing: virtqueue number -> (packets, microseconds).
        answer: what the device writes besides its status: in front of it, and behind it.
        log: (class, command, accepted) of every command.
    """

    def __init__(self, model: Net) -> None:
        self._model = model
        self.log: list[tuple[int, int, bool]] = []
        self.answer: tuple[bytes, bytes] = (b"", b"")
        self.reset()

    def reset(self) -> None:
        """As after a device reset."""
        self.modes: set[int] = set()
        self.table: set[bytes] = set()
        self.vlans: set[int] = set()
        self.pairs = 1
        self.transmits = (1, "DRV-NET-103")
        self.offloads = 0
        self.steering: Steering | None = None
        self.coalescing: dict[int, tuple[int, int]] = {}

    def use_pairs(self, pairs: int) -> None:
        """So many queue pairs are in use from now on, by VQ_PAIRS_SET or what stands for it (5.1.9.5.5)."""
        self.pairs = pairs
        self.transmits = (pairs, "DRV-NET-104")

    def start(self, features: int) -> None:
        """After negotiation every negotiated receive offload is on (5.1.9.5.9.1)."""
        self.offloads = features & sum(1 << bit for bit in RECEIVE_OFFLOADS)

    def command(self, request: bytes) -> Result:
        """Carry out class, command and data."""
        if len(request) < 2:
            return False, "DRV-NET-186", f"a control request of {len(request)} bytes"
        self.answer = (b"", b"")
        kind, command, data = request[0], request[1], request[2:]
        actions = {
            net.CTRL_RX: self._rx,
            net.CTRL_MAC: self._mac,
            net.CTRL_VLAN: self._vlan,
            net.CTRL_ANNOUNCE: self._announce,
            net.CTRL_MQ: self._mq,
            net.CTRL_GUEST_OFFLOADS: self._guest_offloads,
            net.CTRL_NOTF_COAL: self._coalesce,
            net.CTRL_STATS: self._statistics,
        }
        action = actions.get(kind)
        result = action(command, data) if action else (False, "", f"class {kind} is not known")
        self.log.append((kind, command, result[0]))
        return result

    def _has(self, bit: int) -> bool:
        return bool(self._model.device.features >> bit & 1)

    def _rx(self, command: int, data: bytes) -> Result:
        extra = command > ALLMULTI
        if not self._has(net.F_CTRL_RX_EXTRA if extra else net.F_CTRL_RX):
            rule = "DRV-NET-91" if extra else "DRV-NET-90"
            return False, rule, f"RX command {command} without its feature"
        if command > NOBCAST or len(data) != 1 or data[0] > 1:
            return False, "DRV-NET-188", f"RX command {command} with data {data.hex()}"
        (self.modes.add if data[0] else self.modes.discard)(command)
        return OK

    def _mac(self, command: int, data: bytes) -> Result:
        if not self._has(net.F_CTRL_RX):
            return False, "DRV-NET-92", "MAC class without CTRL_RX"
        if command == MAC_ADDR_SET:
            if not self._has(net.F_CTRL_MAC_ADDR) or len(data) != 6:
                return False, "DRV-NET-189", f"ADDR_SET of {len(data)} bytes, or without CTRL_MAC_ADDR"
            self._model.config["mac"] = data
            self._model.device.bump_generation()
            return OK
        table = _mac_table(data) if command == MAC_TABLE_SET else None
        if table is None:
            return False, "DRV-NET-94", f"MAC command {command} with {len(data)} bytes"
        self.table = table
        return OK

    def _vlan(self, command: int, data: bytes) -> Result:
        if not self._has(net.F_CTRL_VLAN):
            return False, "", "VLAN class without CTRL_VLAN"
        if command not in (VLAN_ADD, VLAN_DEL) or len(data) != 2:
            return False, "DRV-NET-190", f"VLAN command {command} with {len(data)} bytes"
        number = int.from_bytes(data, "little")
        (self.vlans.add if command == VLAN_ADD else self.vlans.discard)(number)
        return OK

    def _announce(self, command: int, data: bytes) -> Result:
        if not self._has(net.F_GUEST_ANNOUNCE) or command != net.CTRL_ANNOUNCE_ACK or data:
            return False, "DRV-NET-191", f"ANNOUNCE command {command} with {len(data)} bytes"
        self._model.acknowledge_announce()
        return OK

    def _mq(self, command: int, data: bytes) -> Result:
        if command in (net.CTRL_MQ_RSS_CONFIG, net.CTRL_MQ_HASH_CONFIG):
            return self._steer(data, command == net.CTRL_MQ_RSS_CONFIG)
        if not self._has(net.F_MQ) or command != net.CTRL_MQ_VQ_PAIRS_SET or len(data) != 2:
            return False, "DRV-NET-192", f"MQ command {command} with {len(data)} bytes"
        pairs = int.from_bytes(data, "little")
        if not 1 <= pairs <= self._model.pairs:
            return False, "DRV-NET-102", f"{pairs} queue pairs of {self._model.pairs}"
        for index in range(2 * pairs):
            if not self._model.device.queues[index].enabled:
                return False, "DRV-NET-101", f"{pairs} queue pairs while queue {index} is not enabled"
        self.use_pairs(pairs)
        if self.steering is not None and self.steering.table:
            self.steering = None
        return OK

    def _steer(self, data: bytes, rss: bool) -> Result:
        if not self._has(net.F_RSS if rss else net.F_HASH_REPORT):
            return False, "DRV-NET-106" if rss else "", "hash or RSS configuration without its feature"
        steering, rule = Steering.parse(data, rss), "DRV-NET-193" if rss else "DRV-NET-198"
        if steering is None:
            return False, rule, f"configuration of {len(data)} bytes"
        if rss:
            queues = self._model.device.queues
            for number in (steering.unclassified, *steering.table):
                if 2 * number >= 2 * self._model.pairs or not queues[2 * number].enabled:
                    return False, "DRV-NET-107", f"receive queue {number} is not enabled"
            self.pairs = max(1, *(number + 1 for number in steering.table))
            self.transmits = (steering.transmits, "DRV-NET-195")
        self.steering = steering
        if len(data) > (length := Steering.length(data, rss)):
            return True, rule, f"configuration of {len(data)} bytes, {length} by what it says"
        return OK

    def _coalesce(self, command: int, data: bytes) -> Result:
        if command == net.CTRL_NOTF_COAL_VQ_GET:
            # The status comes behind the parameters, whether they mean anything or not.
            self.answer = (bytes(8), b"")
        single = command in (net.CTRL_NOTF_COAL_VQ_SET, net.CTRL_NOTF_COAL_VQ_GET)
        if not self._has(net.F_VQ_NOTF_COAL if single else net.F_NOTF_COAL):
            return False, "DRV-NET-117" if single else "DRV-NET-116", "coalescing without its feature"
        size = {net.CTRL_NOTF_COAL_VQ_SET: 12, net.CTRL_NOTF_COAL_VQ_GET: 4}.get(command, 8)
        if command > net.CTRL_NOTF_COAL_VQ_GET or len(data) != size:
            return False, "DRV-NET-200", f"NOTF_COAL command {command} with {len(data)} bytes"
        queues = range(int(command == net.CTRL_NOTF_COAL_TX_SET), 2 * self._model.pairs, 2)
        if single:
            number = int.from_bytes(data[:2], "little")
            if number >= 2 * self._model.pairs or not self._model.device.queues[number].enabled:
                return False, "DRV-NET-115", f"virtqueue {number} is no enabled data queue"
            queues = range(number, number + 1)
        if command == net.CTRL_NOTF_COAL_VQ_GET:
            self.answer = (struct.pack("<II", *self.coalescing.get(queues[0], (0, 0))), b"")
            return OK
        packets, microseconds = struct.unpack("<II", data[-8:])
        self.coalescing |= dict.fromkeys(queues, (packets, microseconds))
        return OK

    def _statistics(self, command: int, data: bytes) -> Result:
        if not self._has(net.F_DEVICE_STATS):
            return False, "", "STATS class without DEVICE_STATS"
        if command == net.CTRL_STATS_QUERY and not data:
            self.answer = (b"", (RX_STATS | TX_STATS | CONTROL_STATS).to_bytes(8, "little"))
            return OK
        if command != net.CTRL_STATS_GET or not data or len(data) % 16:
            return False, "DRV-NET-201", f"STATS command {command} with {len(data)} bytes"
        reply = b""
        control = self._model.control_index(self._model.device.features)
        for queue, types in struct.iter_unpack("<H6xQ", data):
            known = CONTROL_STATS if queue == control else TX_STATS if queue % 2 else RX_STATS
            if queue > (control or 0) or types != known:
                return False, "DRV-NET-120", f"statistics {types:#x} of virtqueue {queue}"
            number = known.bit_length() - 1
            values = self._counters(number)
            reply += struct.pack("<BxH2xH", number, queue, 8 + 8 * len(values))
            reply += struct.pack(f"<{len(values)}Q", *values)
        self.answer = (b"", reply)
        return OK

    def _counters(self, number: int) -> list[int]:
        model = self._model
        known = {
            "command_num": len(self.log) + 1,
            "ok_num": sum(accepted for _, _, accepted in self.log) + 1,
            "rx_packets": model.received,
            "rx_drops": model.dropped,
            "tx_packets": model.sent,
        }
        return [known.get(name, 0) for name in net.STATS[number]]

    def _guest_offloads(self, command: int, data: bytes) -> Result:
        if not self._has(net.F_CTRL_GUEST_OFFLOADS) or command != GUEST_OFFLOADS_SET or len(data) != 8:
            return False, "DRV-NET-199", f"GUEST_OFFLOADS command {command} with {len(data)} bytes"
        wanted = int.from_bytes(data, "little")
        allowed = self._model.device.features & sum(1 << bit for bit in RECEIVE_OFFLOADS)
        if wanted & ~allowed:
            return False, "DRV-NET-114", f"offloads {wanted:#x} of {allowed:#x} negotiated"
        self.offloads = wanted
        return OK

    def accepts(self, data: bytes) -> bool:
        """Whether the receive filter lets a frame through."""
        vlan = vlan_id(data)
        if vlan is not None and self._has(net.F_CTRL_VLAN) and vlan not in self.vlans:
            return False
        if not self._has(net.F_CTRL_RX) or PROMISC in self.modes:
            return True
        target = data[:6]
        if target == BROADCAST:
            return NOBCAST not in self.modes
        if target[0] & 1:
            return NOMULTI not in self.modes and (ALLMULTI in self.modes or target in self.table)
        if NOUNI in self.modes:
            return False
        return ALLUNI in self.modes or target == self._model.config["mac"] or target in self.table


def _mac_table(data: bytes) -> set[bytes] | None:
    """Two tables, each le32 count and so many addresses: unicast, then multicast."""
    found: set[bytes] = set()
    for _ in range(2):
        count = int.from_bytes(data[:4], "little")
        if len(data) < 4 + 6 * count:
            return None
        found.update(data[4 + 6 * n : 10 + 6 * n] for n in range(count))
        data = data[4 + 6 * count :]
    return None if data else found
