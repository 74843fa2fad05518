"""A soak: traffic on all three devices of a guest, with link flaps, resizes, targets, resets, restarts."""
