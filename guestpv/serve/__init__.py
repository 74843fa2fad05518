"""Our device models on a socket, for hypervisors and drivers of other makers."""
