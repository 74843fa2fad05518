"""The kernel's PCI functions, through VFIO."""
