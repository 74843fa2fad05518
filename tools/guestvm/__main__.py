"""`python -m guestvm` is ./tools/guest without the set-up."""

from guestvm.cli import entry

entry()
