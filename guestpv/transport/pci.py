"""Modern virtio over PCI (4.1), on any PCI function: the kernel's, QEMU's, our own in software."""

from __future__ import annotations

import contextlib

from ..errors import DeviceGone, DeviceViolation, GuestpvError, Refused, UsageError
from ..memory import DmaPool
from ..pci.capabilities import VirtioCapability, first, require_virtio, virtio_capabilities
from ..pci.function import PciFunction
from ..spec import features as feat
from ..spec import pci as spec
from ..spec.layout import Field, Layout
from ..spec.pci import CfgType
from ..system import SYSTEM
from ..virtqueue.kick import Kick
from ..virtqueue.queue import Virtqueue
from .base import InterruptMode, Transport
from .interrupts import Fanout
from .registers import RegisterBlock

FEATURE_WORDS = 4
"""Feature words looked at: the standard assigns bits up to 127 (2.2)."""

ISR_LAYOUT = Layout("isr", "4.1.4.5", (Field("isr", 0, 1),))
DEVICE_LAYOUT = Layout("device configuration", "4.1.4.6", (Field("byte", 0, 1),))


class PciTransport(Transport):
    """The modern virtio-pci transport.

    Attributes:
        queue_class: what queues are made of.

    Raises:
        Refused: the function is not a virtio device, or has no usable modern structures.
    """

    queue_class: type[Virtqueue] = Virtqueue

    def __init__(self, function: PciFunction) -> None:
        self.function = function
        device_type = require_virtio(function.name, function.config_read)
        self.capabilities = virtio_capabilities(function.config_read)
        common = self._structure(CfgType.COMMON, spec.COMMON_CFG_MIN_LENGTH)
        notify = self._structure(CfgType.NOTIFY, 2)
        isr = self._structure(CfgType.ISR, 1)
        self._enable_function()
        self.common = RegisterBlock(function.bar(common.bar), common.offset, common.length, spec.COMMON_CFG)
        self._isr = RegisterBlock(function.bar(isr.bar), isr.offset, isr.length, ISR_LAYOUT)
        self._notify = notify
        device = first(self.capabilities, CfgType.DEVICE)
        self._device = (
            RegisterBlock(function.bar(device.bar), device.offset, device.length, DEVICE_LAYOUT)
            if device
            else None
        )
        super().__init__(function.name, device_type, DmaPool(function.dma))
        self.mode: InterruptMode = "msix" if function.msix_vectors else "intx"
        self._vectors: list[int] = []
        self._fanout: Fanout | None = None
        self._queue_fds: dict[int, int] = {}
        self._config_fd: int | None = None
        self._own_fds: list[int] = []
        self._sinks: list[int] = []

    def _enable_function(self) -> None:
        command = self.function.config_read(spec.PCI_CONFIG_COMMAND, 2)
        self.function.config_write(
            spec.PCI_CONFIG_COMMAND, 2, command | spec.COMMAND_MEMORY | spec.COMMAND_BUS_MASTER
        )

    def check_live(self) -> None:
        try:
            super().check_live()
        except DeviceGone:
            self._check_function()
            raise

    def _check_function(self) -> None:
        """Registers read as all ones: because the function is gone, or because a reset made it deaf?"""
        read = self.function.config_read
        if read(0, 2) != 0xFFFF and not read(spec.PCI_CONFIG_COMMAND, 2) & spec.COMMAND_MEMORY:
            raise DeviceViolation(
                "memory decoding is off in the command register: somebody else reset the function",
                where=self.name,
            )

    def revive(self) -> None:
        # A reset of the whole function, if that is what it went through, takes these bits away as well.
        self._enable_function()
        super().revive()

    def _structure(self, kind: CfgType, least: int) -> VirtioCapability:
        name = self.function.name
        found = first(self.capabilities, kind)
        if found is None:
            raise Refused(
                f"the function has no virtio {kind.name} capability: a legacy-only device, which is not "
                "driven here",
                where=name,
                hint="QEMU: -device virtio-...-pci,disable-modern=off",
            )
        if found.length < least:
            raise DeviceViolation(
                f"the virtio {kind.name} structure is {found.length} bytes long, {least} are needed",
                section="4.1.4",
                where=name,
            )
        size = self.function.bar(found.bar).size
        # A structure may claim more than we use of it, but what we use has to be there.
        if found.offset + least > size:
            raise DeviceViolation(
                f"the virtio {kind.name} structure at {found.offset:#x} lies outside BAR {found.bar} "
                f"of {size} bytes",
                section="4.1.4",
                where=name,
            )
        return found

    # Status and features.

    def read_status(self) -> int:
        return self.common.read("device_status")

    def write_status(self, value: int) -> None:
        self.common.write("device_status", value)

    def read_features(self) -> int:
        offered = 0
        for word in range(FEATURE_WORDS):
            self.common.write("device_feature_select", word)
            offered |= self.common.read("device_feature") << (32 * word)
        return offered

    def write_features(self, features: int) -> None:
        for word in range(FEATURE_WORDS):
            part = features >> (32 * word) & 0xFFFFFFFF
            # Words above 1 are written only when used: older devices know just two.
            if word < 2 or part:
                self.common.write("driver_feature_select", word)
                self.common.write("driver_feature", part)

    @property
    def must_translate(self) -> bool:
        return self.function.translated

    # Queues.

    @property
    def num_queues(self) -> int:
        return self.common.read("num_queues")

    def queue_max_size(self, index: int) -> int:
        self.common.write("queue_select", index)
        return self.common.read("queue_size")

    def set_up_queue(self, index: int, size: int, features: int) -> Virtqueue:
        common = self.common
        common.write("queue_select", index)
        kick = self.doorbell(index, features)
        queue = self.queue_class(
            index,
            size,
            features,
            self.pool,
            kick,
            interrupt_fd=self._queue_fd(index),
            name=f"{self.name} queue {index}",
        )
        try:
            common.write("queue_size", size)
            if (readback := common.read("queue_size")) != size:
                raise DeviceViolation(
                    f"queue {index} reads back size {readback} after {size} was written",
                    section="4.1.4.3.1",
                    where=self.name,
                )
            self._map_vector("queue_msix_vector", self._queue_vector(index), f"queue {index}")
            common.write("queue_desc", queue.addresses.desc)
            common.write("queue_driver", queue.addresses.driver)
            common.write("queue_device", queue.addresses.device)
            common.write("queue_enable", 1)
        except BaseException:
            # Not enabled, so the device never looked at the rings.
            queue.close()
            raise
        return queue

    def doorbell(self, index: int, features: int) -> Kick:
        """How queue ``index``, which is selected, is notified with these features (4.1.4.4, 4.1.5.2).

        Raises:
            DeviceViolation: the device's structures have no room for it.
        """
        offset = self.common.read("queue_notify_off") * self._notify.extra
        width = 4 if features >> feat.F_NOTIFICATION_DATA & 1 else 2
        if offset + width > self._notify.length:
            raise DeviceViolation(
                f"queue_notify_off of queue {index} leads to {offset:#x}, outside the notification structure "
                f"of {self._notify.length:#x} bytes",
                section="4.1.4.4",
                where=self.name,
            )
        value = index
        if features >> feat.F_NOTIF_CONFIG_DATA & 1:
            if not self.common.has("queue_notif_config_data"):
                raise DeviceViolation(
                    "NOTIF_CONFIG_DATA was negotiated, but the common configuration is too short for "
                    "queue_notif_config_data",
                    section="4.1.4.3",
                    where=self.name,
                )
            value = self.common.read("queue_notif_config_data")
        bar = self.function.bar(self._notify.bar)
        at = self._notify.offset + offset
        if bar.pointer:
            return Kick.mmio(bar.pointer + at, width, value)
        return Kick.call(lambda word: bar.write(at, width, word), value)

    def request_queue_reset(self, index: int) -> None:
        self.common.write("queue_select", index)
        self.common.write("queue_reset", 1)

    def queue_reset_done(self, index: int) -> bool:
        self.common.write("queue_select", index)
        return self.common.read("queue_reset") == 0

    # Interrupts.

    def set_up_interrupts(self) -> None:
        self._tear_down_interrupts()
        function, queues = self.function, self.num_queues
        if self.mode == "msix" and not function.msix_vectors:
            raise UsageError("the function has no MSI-X", where=self.name)
        if function.msix_vectors and self.mode in ("msix", "poll"):
            wanted = 1 if self.mode == "poll" else min(function.msix_vectors, queues + 1)
            self._vectors = function.enable_msix(wanted)
            self._config_fd = self._vectors[0]
            if self.mode == "msix" and wanted < queues + 1:
                self._share_vectors()
            self._map_vector("config_msix_vector", 0, "configuration changes")
        elif self.mode == "intx":
            source = function.enable_intx()
            self._config_fd = self._new_fd()
            self._fanout = Fanout()
            self._fanout.intx(
                source, lambda: self._isr.read("isr"), function.unmask_intx, self._sinks, self._config_fd
            )

    @property
    def interrupts_are_shared(self) -> bool:
        """Whether several queues have one interrupt, which a thread passes on to their eventfds."""
        return self._fanout is not None

    def _share_vectors(self) -> None:
        """Fewer vectors than queues: all queues share the last one, configuration too when it is alone."""
        self._fanout = Fanout()
        if len(self._vectors) == 1:
            self._config_fd = self._new_fd()
            self._sinks.append(self._config_fd)
        self._fanout.share(self._vectors[-1], self._sinks)

    def _queue_vector(self, index: int) -> int:
        if self.mode != "msix":
            return spec.NO_VECTOR
        return len(self._vectors) - 1 if self._fanout else index + 1

    def _queue_fd(self, index: int) -> int | None:
        if self.mode == "poll":
            return None
        if self._fanout is None:
            return self._vectors[index + 1]
        if index not in self._queue_fds:
            self._queue_fds[index] = self._new_fd()
            self._sinks.append(self._queue_fds[index])
        return self._queue_fds[index]

    def _new_fd(self) -> int:
        fd = SYSTEM.eventfd()
        self._own_fds.append(fd)
        return fd

    def _map_vector(self, register: str, vector: int, purpose: str) -> None:
        if vector == spec.NO_VECTOR and not self._vectors:
            return
        self.common.write(register, vector)
        if self.common.read(register) != vector:
            raise GuestpvError(
                f"the device refused MSI-X vector {vector} for {purpose}",
                where=self.name,
                hint="it is out of resources for interrupts; try --poll",
            )

    def _tear_down_interrupts(self) -> None:
        if self._fanout is not None:
            self._fanout.close()
            self._fanout = None
        self.function.disable_interrupts()
        for fd in self._own_fds:
            SYSTEM.close(fd)
        self._own_fds.clear()
        self._sinks.clear()
        self._queue_fds.clear()
        self._vectors = []
        self._config_fd = None

    @property
    def config_fd(self) -> int | None:
        return self._config_fd

    def release_fds(self) -> tuple[int | None, int | None]:
        return self.function.request_fd(), self.function.error_fd()

    # Device configuration.

    @property
    def config_length(self) -> int:
        return self._device.length if self._device else 0

    def config_generation(self) -> int:
        return self.common.read("config_generation")

    def read_config(self, offset: int, width: int) -> int:
        return self._device_block().read_at(offset, width)

    def write_config(self, offset: int, width: int, value: int) -> None:
        self._device_block().write_at(offset, width, value)

    def _device_block(self) -> RegisterBlock:
        if self._device is None:
            raise UsageError("the device has no configuration structure", where=self.name)
        return self._device

    # The end.

    def silence(self) -> None:
        if not self.function.reset():
            command = self.function.config_read(spec.PCI_CONFIG_COMMAND, 2)
            self.function.config_write(spec.PCI_CONFIG_COMMAND, 2, command & ~spec.COMMAND_BUS_MASTER)

    def release(self) -> None:
        # Interrupt teardown speaks to the function; one that is gone must still be closed.
        with contextlib.ExitStack() as stack:
            stack.callback(self.function.close)
            self._tear_down_interrupts()
