"""The standard as data: registers, rings, features, device types. No behaviour, no imports of ours.

Section numbers are those of Virtual I/O Device (VIRTIO) 1.4, Committee Specification 01.
"""
