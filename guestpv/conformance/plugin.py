"""The pytest plugin that opens the device under test and turns what tests do into verdicts."""
