"""The conformance suite: checks of devices and of drivers, requirement by requirement."""
