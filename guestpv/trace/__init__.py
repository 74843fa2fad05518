"""The contract between driver and device made visible."""

from .record import Recorder
from .ring_svg import ring_picture

__all__ = ["Recorder", "ring_picture"]
