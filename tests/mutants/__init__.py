"""Broken peers, by name: each breaks a requirement on purpose and has to be caught by its check."""
