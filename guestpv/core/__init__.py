"""The C core, built through cffi's API mode as ``guestpv.core._core``."""
