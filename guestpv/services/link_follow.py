"""Keeps a network device and the link that shows it alike, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..drivers.net import Net
from ..drivers.net_config import LinkState
from ..errors import DeviceViolation, GuestpvError
from ..spec import net as spec
from .announce import announce
from .link_watch import LinkView, LinkWatch
from .tap import Tap


class LinkFollower:
    """Carries changes of the device to its TAP link and changes of the link to the device.

    From the device: link state, speed, the request to announce ourselves. From the link: address, who else
    listens, up and down; an MTU that the device does not take is set back. The kernel tells nobody which
    multicast groups are joined, so the device is asked for all multicast.

    Args:
        net: the device, live.
        tap: its link, up.
    """

    def __init__(self, net: Net, tap: Tap) -> None:
        self._net = net
        self._tap = tap
        self._watch = LinkWatch(tap.ifindex)
        self._troubles: list[str] = []
        self._refused: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Device and link know nothing of each other yet: at first, and after a reset."""
        net, tap = self._net, self._tap
        self.state = net.state
        self._view: LinkView | None = LinkView(tap.name, net.mac, tap.mtu)
        self._modes: dict[str, bool] = {}
        self._unicast: frozenset[bytes] = frozenset()
        tap.set_carrier(self.state.up)
        tap.set_speed(self.state.speed, self.state.duplex)
        if net.transport.has(spec.F_CTRL_RX):
            self._mode("allmulti", True)
            self._mode("promisc", False)

    def fileno(self) -> int:
        """Readable when some link of the kernel changed."""
        return self._watch.fileno()

    @property
    def view(self) -> LinkView | None:
        """The link as it was last seen, None where it is gone or in another namespace."""
        return self._view

    def troubles(self) -> list[str]:
        """What the device refused since the last call, in words."""
        found, self._troubles = self._troubles, []
        return found

    # From the device.

    def device_changed(self) -> list[str]:
        """Look at the device's state; what changed, in words."""
        before, now = self.state, self._net.state
        self.state = now
        events = []
        if now.up != before.up:
            self._tap.set_carrier(now.up)
            events.append("link up" if now.up else "link down")
        if (now.speed, now.duplex) != (before.speed, before.duplex):
            self._tap.set_speed(now.speed, now.duplex)
            events.append(f"speed {speed_text(now)}")
        if now.announce and self._net.transport.has(spec.F_GUEST_ANNOUNCE):
            events.append(self._announce())
        return events + self.troubles()

    def _announce(self) -> str:
        around = self._view.around if self._view else frozenset()
        try:
            text = f"announced ourselves to the network with {announce([self._tap.ifindex, *around])} frames"
        except (OSError, ValueError) as error:
            text = f"could not announce ourselves to the network: {error}"
        self._command("acknowledge the announcement", lambda control: control.acknowledge_announce())
        return text

    # From the link.

    def link_changed(self) -> list[str]:
        """Look at the link and tell the device; what changed, in words."""
        before, now = self._view, self._watch.look()
        self._view = now
        if now is None and before is None:
            return []
        if now is None:
            return ["the link is gone, or in another network namespace; what is set there is not followed"]
        events = []
        if before is None or now.name != before.name:
            self._tap.name = now.name
            events.append(f"the link is called {now.name}")
        if before is None or now.mac != before.mac:
            events.append(self._set_mac(now.mac))
        if before is None or now.mtu != before.mtu:
            events.append(self._set_mtu(now.mtu))
        # Also what the device refused the last time.
        self._filter(now)
        return [event for event in events if event] + self.troubles()

    def _set_mac(self, mac: bytes) -> str:
        if mac == self._net.mac:
            return ""
        has = self._net.transport.has
        if not (has(spec.F_CTRL_RX) and has(spec.F_CTRL_MAC_ADDR)):
            self._mode("promisc", True)
            return f"MAC address {mac.hex(':')}; the device cannot be told (no CTRL_MAC_ADDR)"
        if self._command("set the MAC address", lambda control: control.set_mac(mac)):
            self._net.mac = mac
        return f"MAC address {mac.hex(':')}"

    def _set_mtu(self, mtu: int) -> str:
        most = self._net.mtu
        if mtu <= most:
            return f"MTU {mtu}" if mtu != self._tap.mtu else ""
        try:
            self._tap.set_mtu(most)
        except (OSError, GuestpvError) as error:
            return f"MTU {mtu} is more than the device takes ({most}): longer frames are dropped ({error})"
        return f"MTU {mtu} is more than the device takes: set back to {most}"

    def _filter(self, now: LinkView) -> None:
        has = self._net.transport.has
        if not has(spec.F_CTRL_RX):
            return
        if now.unicast != self._unicast and self._command(
            "set the address filter", lambda control: control.set_filter(sorted(now.unicast))
        ):
            self._unicast = now.unicast
        self._mode("promisc", now.promiscuous or now.mac != self._net.mac)
        if has(spec.F_CTRL_RX_EXTRA):
            # Whoever sets the link down wants nothing from it; the device need not fill our buffers.
            for name in ("nouni", "nomulti", "nobcast"):
                self._mode(name, not now.up)

    def _mode(self, name: str, on: bool) -> None:
        # Of promiscuous mode nobody knows how it begins: QEMU's is on.
        known = self._modes.get(name, None if name == "promisc" else False)
        if known == on or not self._net.transport.has(spec.F_CTRL_RX):
            return
        if self._command(f"set {name} {'on' if on else 'off'}", lambda control: control.set_mode(name, on)):
            self._modes[name] = on

    def _command(self, what: str, run: Callable[[Any], None]) -> bool:
        """Traffic goes on without what a command was for; a device that breaks the standard is the end."""
        if self._net.control is None:
            return False
        try:
            run(self._net.control)
        except DeviceViolation:
            raise
        except GuestpvError as error:
            if self._refused.get(what) != error.message:
                self._troubles.append(f"could not {what}: {error.message}")
            self._refused[what] = error.message
            return False
        self._refused.pop(what, None)
        return True

    def close(self) -> None:
        """Follow no more."""
        self._watch.close()


def speed_text(state: LinkState) -> str:
    """Speed and duplex for a person."""
    if state.speed is None:
        return "unknown"
    return f"{state.speed} Mbit/s" + (f" {state.duplex} duplex" if state.duplex else "")
