"""All mutants of drivers, and the healthy walks."""

from . import driver_common
from .driver_bench import WALKS, Walk

__all__ = ["WALKS", "Walk", "driver_common"]
