"""PCI functions, wherever they live."""
