"""The benchmarks behind ``tools/bench``: one module a name."""
