"""Errors of the peers' tools."""


class PeerError(Exception):
    """A peer is missing or does not run; the message says what to do."""
