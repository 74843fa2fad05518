"""Checks of a device. ``pytest --pyargs guestpv.conformance.device --device SPEC`` runs them."""
