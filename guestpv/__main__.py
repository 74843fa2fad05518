"""``python -m guestpv`` is the command ``guestpv``."""

from .cli.main import main

main()
