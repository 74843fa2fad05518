"""The contract between driver and device made visible."""

from .ring_svg import ring_picture

__all__ = ["ring_picture"]
