"""All mutants of drivers, and the healthy walks."""

from . import driver_common, driver_pci, driver_ring
from .driver_bench import WALKS, Walk

__all__ = ["WALKS", "Walk", "driver_common", "driver_pci", "driver_ring"]
