"""How a driver reaches a device: the status machine, registers, and the making of queues."""
