"""What stands behind the rings: one device type a file."""
