"""The status machine of section 3.1, written once, and the making of queues.

A transport is opened reset and not negotiated. A driver negotiates, makes its queues and sets
DRIVER_OK; ``close`` resets the device and waits for it before any memory is taken away.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from ..errors import DeviceGone, DeviceViolation, FeaturesRefused, Refused, TimeLimit, UsageError
from ..memory import DmaPool
from ..spec import features as feat
from ..spec.layout import Field, Layout
from ..spec.status import Status
from ..virtqueue.queue import Virtqueue

LOG = logging.getLogger(__name__)
InterruptMode = Literal["msix", "intx", "poll"]

RING_FEATURES = feat.mask(
    (
        feat.F_INDIRECT_DESC,
        feat.F_EVENT_IDX,
        feat.F_VERSION_1,
        feat.F_ACCESS_PLATFORM,
        feat.F_RING_PACKED,
        feat.F_IN_ORDER,
        feat.F_ORDER_PLATFORM,
        feat.F_NOTIFICATION_DATA,
        feat.F_NOTIF_CONFIG_DATA,
        feat.F_RING_RESET,
    )
)
"""Device-independent features that every transport here can carry."""

DEFAULT_QUEUE_SIZE = 256
RESET_TIME_LIMIT = 10.0
GENERATION_TRIES = 100


@dataclass(frozen=True, slots=True)
class FeatureFilter:
    """What a user forces on or off: bit masks of features."""

    required: int = 0
    denied: int = 0

    @classmethod
    def parse(cls, text: str, device_type: int) -> FeatureFilter:
        """Parse ``+mrg_rxbuf,-event_idx``; a name without a sign is required.

        Raises:
            UsageError: a name is unknown for this device type, or asked for and denied at once.
        """
        required = denied = 0
        for word in filter(None, (part.strip() for part in text.split(","))):
            try:
                bit = feat.feature_bit(device_type, word.lstrip("+-"))
            except KeyError:
                names = [*feat.DEVICE_FEATURES.get(device_type, {}).values(), *feat.COMMON_FEATURES.values()]
                raise UsageError(
                    f"no feature is called {word.lstrip('+-')!r}",
                    where=f"features {text!r}",
                    hint="known: " + " ".join(name.lower() for name in names),
                ) from None
            if word.startswith("-"):
                denied |= 1 << bit
            else:
                required |= 1 << bit
        if both := required & denied:
            raise UsageError(
                f"{', '.join(feat.feature_names(device_type, both))} both required and denied",
                where=f"features {text!r}",
            )
        return cls(required, denied)


@dataclass(slots=True)
class _State:
    """What the driver side knows of the device's life."""

    status: Status = Status.RESET
    offered: int = 0
    features: int = 0
    queues: dict[int, Virtqueue] = field(default_factory=dict)


class Transport(ABC):
    """One device, reached somehow.

    Attributes:
        name: how messages call the device.
        device_type: virtio device id (chapter 5).
        pool: DMA memory that the device sees.
        feature_filter: the user's wishes; set it before a driver negotiates.
        mode: how the device's notifications arrive; set it before a driver negotiates.
    """

    mode: InterruptMode

    def __init__(self, name: str, device_type: int, pool: DmaPool) -> None:
        self.name = name
        self.device_type = device_type
        self.pool = pool
        self.feature_filter = FeatureFilter()
        self._state = _State()
        self._closed = False

    # What a concrete transport provides.

    @abstractmethod
    def read_status(self) -> int:
        """The device status field as the device shows it."""

    @abstractmethod
    def write_status(self, value: int) -> None:
        """Write the device status field."""

    @abstractmethod
    def read_features(self) -> int:
        """All feature bits that the device offers."""

    @abstractmethod
    def write_features(self, features: int) -> None:
        """Write the accepted features, every word of them."""

    @property
    @abstractmethod
    def num_queues(self) -> int:
        """How many virtqueues the device has at most."""

    @abstractmethod
    def queue_max_size(self, index: int) -> int:
        """Largest size the device supports for a queue, 0 where the queue does not exist."""

    @abstractmethod
    def set_up_queue(self, index: int, size: int, features: int) -> Virtqueue:
        """Make the rings of a queue, tell the device and enable it."""

    @abstractmethod
    def set_up_interrupts(self) -> None:
        """Prepare interrupts for the negotiated device in ``mode``."""

    @abstractmethod
    def request_queue_reset(self, index: int) -> None:
        """Write 1 to ``queue_reset`` (needs RING_RESET)."""

    @abstractmethod
    def queue_reset_done(self, index: int) -> bool:
        """Whether ``queue_reset`` reads 0 again."""

    @property
    @abstractmethod
    def config_length(self) -> int:
        """Bytes of device configuration that the device has."""

    @abstractmethod
    def config_generation(self) -> int:
        """A value that changes whenever the configuration noticeably does (2.5.1)."""

    @abstractmethod
    def read_config(self, offset: int, width: int) -> int:
        """One element of device configuration."""

    @abstractmethod
    def write_config(self, offset: int, width: int, value: int) -> None:
        """One element of device configuration."""

    @property
    @abstractmethod
    def config_fd(self) -> int | None:
        """Eventfd of configuration changes, None in a mode without them."""

    @property
    def must_translate(self) -> bool:
        """Whether bus addresses differ from the guest's physical ones, so ACCESS_PLATFORM is a must."""
        return False

    def release_fds(self) -> tuple[int | None, int | None]:
        """Eventfds for "let go of the function" and "unrecoverable bus error", where there are any."""
        return None, None

    @abstractmethod
    def silence(self) -> None:
        """Make sure by other means than a reset that the device does no more DMA."""

    @abstractmethod
    def release(self) -> None:
        """Give back everything below the transport. Idempotent."""

    # The status machine.

    @property
    def offered(self) -> int:
        """Feature bits that the device offers."""
        if not self._state.offered:
            self._state.offered = self.read_features()
        return self._state.offered

    @property
    def features(self) -> int:
        """Feature bits that were negotiated, 0 before."""
        return self._state.features

    def has(self, bit: int) -> bool:
        """Whether a feature was negotiated."""
        return bool(self._state.features >> bit & 1)

    @property
    def status(self) -> Status:
        """The device status field as the device shows it now.

        Raises:
            DeviceGone: the register reads as all ones, as an absent function's does.
        """
        value = self.read_status()
        if value == 0xFF:
            raise DeviceGone("device_status reads 0xff: the function is gone", where=self.name)
        return Status(value)

    def check_live(self) -> None:
        """See that the device is what the driver made of it: live, and not in need of a reset.

        Raises:
            DeviceViolation: DEVICE_NEEDS_RESET is set (2.1.2), or DRIVER_OK is not any more: somebody else
                reset the device, or its registers read as zeros because it is gone.
            DeviceGone: the function is gone.
        """
        status = self.status
        if status & Status.NEEDS_RESET:
            raise DeviceViolation(
                "the device set DEVICE_NEEDS_RESET: it met an error that it cannot recover from",
                section="2.1.2",
                where=self.name,
            )
        if not status & Status.DRIVER_OK:
            raise DeviceViolation(
                f"device_status reads {int(status):#04x} although the driver set DRIVER_OK: somebody else "
                "reset the device, or it is gone",
                section="2.1.2",
                where=self.name,
            )

    def revive(self) -> None:
        """Reset a device that was live, whatever became of it, so that it can be negotiated again.

        Queues are closed once the device is quiet; what was in flight is the driver's to do again.

        Raises:
            TimeLimit, DeviceGone: as ``reset``.
        """
        self.reset()

    def check_same(self, features: int) -> None:
        """Raise Refused unless exactly these features were negotiated this time, too."""
        if self.features != features:
            names = " ".join(feat.feature_names(self.device_type, self.features ^ features))
            raise Refused(
                f"the device came back with other features; the difference is {names}", where=self.name
            )

    def _advance(self, bit: Status) -> None:
        self._state.status |= bit
        self.write_status(int(self._state.status))

    def reset(self, timeout: float | None = None) -> None:
        """Reset the device and wait until ``device_status`` reads 0 (2.4, DRV-RESET-01, DRV-PCI-26).

        Queues are closed once the device is quiet; what was in flight is theirs to drain before.

        Args:
            timeout: seconds, 10 where none is given.

        Raises:
            TimeLimit: the device never left reset; its memory stays mapped.
            DeviceGone: the function is gone.
        """
        timeout = RESET_TIME_LIMIT if timeout is None else timeout
        self.write_status(0)
        deadline = time.monotonic() + timeout
        pause = 0.0001
        while (status := self.status) != 0:
            if time.monotonic() > deadline:
                raise TimeLimit(
                    f"device_status still reads {int(status):#04x} {timeout:g} s after the reset",
                    where=self.name,
                    hint="the device hangs in its reset (section 2.4.1): look at the hypervisor's log",
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        LOG.debug("%s: reset", self.name)
        self._forget()

    def _forget(self) -> None:
        for queue in self._state.queues.values():
            queue.close()
        self._state = _State(offered=self._state.offered)

    def negotiate(self, supported: int, required: int = 0) -> int:
        """Steps 1 to 6 of 3.1.1: reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK read back.

        Args:
            supported: mask of the device type's own features that the driver can use; device-independent
                ones are added here.
            required: mask of those it cannot do without.

        Returns:
            The negotiated mask, also in ``features``.

        Raises:
            Refused: going on would be wrong: a legacy-only device, ACCESS_PLATFORM missing behind an
                IOMMU, a feature missing that driver or user require. FAILED is set.
            FeaturesRefused: the device did not keep FEATURES_OK. FAILED is set.
        """
        self.reset()
        with self.failing():
            self._advance(Status.ACKNOWLEDGE)
            self._advance(Status.DRIVER)
            self._state.offered = self.read_features()
            wanted = self._choose(self._state.offered, supported, required)
            self.write_features(wanted)
            self._advance(Status.FEATURES_OK)
            if not self.status & Status.FEATURES_OK:
                raise FeaturesRefused(
                    "the device did not keep FEATURES_OK for "
                    + " ".join(feat.feature_names(self.device_type, wanted)),
                    where=self.name,
                    hint="it offers "
                    + " ".join(feat.feature_names(self.device_type, self._state.offered))
                    + "; leave features out with --features -NAME to find the one it refuses",
                )
            self._state.features = wanted
            LOG.info("%s: negotiated %s", self.name, " ".join(feat.feature_names(self.device_type, wanted)))
            self.set_up_interrupts()
        return wanted

    def _choose(self, offered: int, supported: int, required: int) -> int:
        names = feat.feature_names
        if not offered >> feat.F_VERSION_1 & 1:
            raise Refused(
                "the device does not offer VERSION_1: it is a legacy device, and only the modern interface "
                "is driven here",
                where=self.name,
                hint="QEMU: -device virtio-...-pci,disable-legacy=on,disable-modern=off",
            )
        if self.must_translate and not offered >> feat.F_ACCESS_PLATFORM & 1:
            raise Refused(
                "the device does not offer ACCESS_PLATFORM: it would take our I/O virtual addresses for "
                "physical ones and corrupt the guest's memory",
                where=self.name,
                hint="QEMU: -device virtio-...-pci,iommu_platform=on   libvirt: <driver iommu='on'/>",
            )
        required |= self.feature_filter.required
        always = 1 << feat.F_VERSION_1 | (1 << feat.F_ACCESS_PLATFORM if self.must_translate else 0)
        if stuck := self.feature_filter.denied & always:
            raise Refused(
                f"{' '.join(names(self.device_type, stuck))} cannot be left out here", where=self.name
            )
        usable = (supported | RING_FEATURES) & ~self.feature_filter.denied
        if missing := required & ~offered:
            raise Refused(
                f"the device does not offer {' '.join(names(self.device_type, missing))}",
                where=self.name,
                hint="it offers " + " ".join(names(self.device_type, offered)),
            )
        if unusable := required & ~usable:
            raise Refused(
                f"this driver cannot use {' '.join(names(self.device_type, unusable))}", where=self.name
            )
        wanted = feat.close_dependencies(self.device_type, offered & usable)
        if broken := required & ~wanted:
            raise Refused(
                f"{' '.join(names(self.device_type, broken))} needs features that are missing or left out",
                where=self.name,
            )
        return wanted

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Set FAILED when the block raises: the driver gives up on the device (3.1.1)."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                self.fail()
            raise

    def fail(self) -> None:
        """Set FAILED. Only a reset leads on from here (DRV-STATUS-03)."""
        LOG.warning("%s: giving up, setting FAILED", self.name)
        self._advance(Status.FAILED)

    def make_queue(self, index: int, size: int | None = None) -> Virtqueue:
        """Make virtqueue ``index`` and enable it, between ``negotiate`` and ``driver_ok``.

        Args:
            index: queue number of the device type.
            size: entries; the device's maximum, at most 256, when not given.

        Raises:
            UsageError: there is no such queue, it exists already, or the size is impossible.
        """
        if not self._state.status & Status.FEATURES_OK:
            raise UsageError("queues are made after negotiate()", where=self.name)
        if index in self._state.queues:
            raise UsageError(f"queue {index} exists already", where=self.name)
        largest = self.queue_max_size(index) if 0 <= index < self.num_queues else 0
        if largest == 0:
            raise UsageError(
                f"the device has no queue {index} (num_queues {self.num_queues})", where=self.name
            )
        packed = self.has(feat.F_RING_PACKED)
        if not packed and largest & (largest - 1):
            raise DeviceViolation(
                f"queue {index} shows a maximum size of {largest}, which is no power of two",
                requirement="DEV-PCI-30",
                section="4.1.4.3.1",
                where=self.name,
            )
        chosen = min(largest, DEFAULT_QUEUE_SIZE) if size is None else size
        if not 1 <= chosen <= largest or (not packed and chosen & (chosen - 1)):
            raise UsageError(
                f"queue {index} cannot have {chosen} entries: at most {largest}"
                + ("" if packed else ", a power of two"),
                where=self.name,
            )
        queue = self.set_up_queue(index, chosen, self._state.features)
        LOG.debug("%s: queue %d has %d entries", self.name, index, chosen)
        self._state.queues[index] = queue
        return queue

    @property
    def queues(self) -> dict[int, Virtqueue]:
        """Queues made since the last reset, by number."""
        return dict(self._state.queues)

    def reset_queue(self, index: int, timeout: float = RESET_TIME_LIMIT) -> list[int]:
        """Reset one queue (2.6.1) and forget it; ``make_queue`` sets it up anew, with any size.

        Returns:
            Tokens of the buffers that the device had not used.

        Raises:
            UsageError: RING_RESET was not negotiated, or there is no such queue.
            TimeLimit: ``queue_reset`` never read 0; the queue's memory stays where it is.
        """
        if not self.has(feat.F_RING_RESET) or index not in self._state.queues:
            raise UsageError(
                f"queue {index} cannot be reset alone: it is not in use, or RING_RESET was not negotiated",
                where=self.name,
            )
        self.request_queue_reset(index)
        deadline = time.monotonic() + timeout
        while not self.queue_reset_done(index):
            if time.monotonic() > deadline:
                raise TimeLimit(f"queue_reset of queue {index} never read 0", where=self.name)
            time.sleep(0.001)
        queue = self._state.queues.pop(index)
        pending = list(queue.drain())
        queue.close()
        return pending

    def driver_ok(self) -> None:
        """Set DRIVER_OK: the device is live (3.1.1 step 8)."""
        self._advance(Status.DRIVER_OK)
        LOG.info("%s: live", self.name)

    # Device configuration.

    def config(self, layout: Layout, *names: str) -> dict[str, int | bytes]:
        """Device configuration, consistent in itself (2.5.1: re-read until the generation holds still).

        Fields whose feature is missing, or that the device's structure is too short for, are left out.
        Before negotiation the offered features decide.

        Args:
            layout: the device type's configuration.
            names: fields to read; all of them when none is named.

        Raises:
            DeviceViolation: the generation changes every time.
        """
        features = self._state.features or self.offered
        length = self.config_length
        fields = [
            f for f in layout if f.exists(features) and f.end <= length and (not names or f.name in names)
        ]
        for _ in range(GENERATION_TRIES):
            before = self.config_generation()
            values = {f.name: self._read_field(f) for f in fields}
            if self.config_generation() == before:
                return values
        raise DeviceViolation(
            f"config_generation changed during {GENERATION_TRIES} reads of the configuration in a row",
            section="2.5.2",
            where=self.name,
        )

    def _read_field(self, item: Field) -> int | bytes:
        if item.count == 1:
            return self.read_config(item.offset, item.width)
        return bytes(self.read_config(item.offset + i, 1) for i in range(item.count * item.width))

    def config_write(self, item: Field, value: int) -> None:
        """Write one field of device configuration, after FEATURES_OK (DRV-INIT-05)."""
        if not item.writable or not self._state.status & Status.FEATURES_OK:
            raise UsageError(f"{item.name} is read-only, or features are not negotiated yet", where=self.name)
        self.write_config(item.offset, item.width, value)

    # The end.

    def close(self) -> None:
        """Reset the device and wait for it, then unmap its memory, then give it back. Idempotent.

        A device that does not come out of reset is silenced by clearing its bus master bit before its
        memory goes.
        """
        if self._closed:
            return
        try:
            self.reset()
        except (TimeLimit, DeviceGone) as error:
            LOG.warning("%s: closed without a reset: %s", self.name, error.message)
            self.abandon()
        finally:
            self._give_back()

    def abandon(self) -> None:
        """Close without asking the device for a reset: for one that hangs or is gone. Idempotent."""
        if self._closed:
            return
        try:
            # What is gone does no DMA; what hangs is stopped by other means.
            with contextlib.suppress(DeviceGone):
                self.silence()
            self._forget()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.pool.close()
        finally:
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
