"""The PCI function behind the socket."""

from __future__ import annotations

import pytest

import guestpv
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceGone, UsageError
from guestpv.pci.vfio_user import VfioUserFunction
from guestpv.spec import pci
from guestpv.spec.pci import CfgType

from .kit import DEVICE_STATUS, VIRTIO_BAR, Serve, opened, until


def test_it_is_a_whole_virtio_function(serve: Serve) -> None:
    server = serve("net?pairs=2")
    with opened(server) as transport:
        assert {capability.cfg_type for capability in transport.capabilities} == {
            CfgType.COMMON,
            CfgType.NOTIFY,
            CfgType.ISR,
            CfgType.DEVICE,
            CfgType.PCI_CFG,
        }
        assert transport.function.msix_vectors == 6
        with pytest.raises(UsageError, match="BAR"):
            transport.function.bar(1)
        with pytest.raises(UsageError, match="BARs 0 to 5"):
            transport.function.bar(6)
        with pytest.raises(UsageError, match="no 4-byte register"):
            transport.function.bar(VIRTIO_BAR).read(2, 4)


def test_registers_through_configuration_space(serve: Serve) -> None:
    """The PCI configuration access capability (4.1.4.9)."""
    with opened(serve()) as transport:
        window = next(c for c in transport.capabilities if c.cfg_type == CfgType.PCI_CFG).position
        common = next(c for c in transport.capabilities if c.cfg_type == CfgType.COMMON)
        write = transport.function.config_write
        write(window + 4, 1, common.bar)
        write(window + 8, 4, common.offset + DEVICE_STATUS)
        write(window + 12, 4, 1)
        write(window + 16, 1, 1)
        assert transport.status == 1
        assert transport.function.config_read(window + 16, 1) == 1


def test_a_reset_leaves_the_command_register(serve: Serve) -> None:
    with opened(serve()) as transport:
        transport.write_status(1)
        assert transport.function.reset()
        assert transport.status == 0
        command = transport.function.config_read(pci.PCI_CONFIG_COMMAND, 2)
        assert command & pci.COMMAND_MEMORY
        assert command & pci.COMMAND_BUS_MASTER


def test_the_next_client_finds_it_as_new(serve: Serve) -> None:
    server = serve()
    transport = opened(server)
    rng = Rng(transport)
    rng.read(10)
    transport.function.close()
    until(lambda: server.connection is None)
    assert server.function.device.status == 0
    assert not server.function.interrupts.enabled
    assert server.function.dma.windows() == ()
    second = VfioUserFunction(server.path)
    assert second.config_read(pci.PCI_CONFIG_COMMAND, 2) == 0
    second.close()


def test_a_second_client_is_turned_away_while_there_is_one(serve: Serve) -> None:
    said: list[str] = []
    server = serve(tell=said.append)
    with opened(server), pytest.raises(DeviceGone, match="it serves somebody else"):
        guestpv.open(server.name)
    with opened(server) as transport, Rng(transport) as rng:
        assert len(rng.read(8)) == 8
    assert "a second client was turned away" in said


@pytest.mark.provokes("a bad status")
def test_what_the_driver_breaks_is_told(serve: Serve) -> None:
    said: list[str] = []
    server = serve(findings=True, tell=said.append)
    with opened(server) as transport:
        transport.write_status(2)
    until(lambda: any("DRV-INIT-02" in text for text in said))
