"""Devices that do whatever they can against the driver, and drivers that have to survive them."""
