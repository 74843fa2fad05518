"""The guest half of each device type, one file a type."""
