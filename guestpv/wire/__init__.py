"""Codecs of the protocols that both ends of a socket share: bytes in, values out, no sockets, no state."""
