"""The device half of virtio in software, written from the standard only.

It shares register tables, dtypes and ring layout with the driver half, and nothing else, so that one
misreading of the standard cannot hide in both.
"""
