"""What the lab is doing, on stderr: a live spinner on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Reports steps with the seconds they took; ``quiet`` prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(f"guest: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show `text` while the block runs and its duration afterwards."""
        started = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console

            with Console(stderr=True).status(f"guest: {text}"):
                yield
        else:
            self.say(f"{text} ...")
            yield
        self.say(f"{text}: {time.monotonic() - started:.1f} s")
