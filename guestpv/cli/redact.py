"""Making what identifies a machine and its user unreadable in texts that leave it."""

from __future__ import annotations

import getpass
import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MAC: Final = re.compile(
    r"(?<![0-9A-Fa-f:])((?:[0-9A-Fa-f]{2}:){3})(?:[0-9A-Fa-f]{2}:){2}[0-9A-Fa-f]{2}(?![0-9A-Fa-f:])"
)
_MAYBE_ADDRESS: Final = re.compile(r"(?<![\w.:])[0-9A-Fa-f:.]{3,}(?![\w.:])")


@dataclass(frozen=True, slots=True)
class Redactor:
    """Replaces MAC addresses (their second half), IP addresses, and names.

    Attributes:
        names: name -> what stands for it, longest names first.
    """

    names: tuple[tuple[str, str], ...] = ()

    @classmethod
    def here(cls) -> Redactor:
        """For this machine and its user."""
        host, user = socket.gethostname(), getpass.getuser()
        names = {str(Path.home()): "~", host: "HOST", host.split(".")[0]: "HOST", user: "USER"}
        kept = {name: word for name, word in names.items() if len(name) > 2 and name not in ("root", "/root")}
        return cls(tuple(sorted(kept.items(), key=lambda pair: -len(pair[0]))))

    def __call__(self, text: str) -> str:
        """The text with all of it replaced."""
        for name, word in self.names:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
        text = _MAC.sub(r"\1xx:xx:xx", text)
        return _MAYBE_ADDRESS.sub(self._address, text)

    @staticmethod
    def _address(match: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        if address.is_loopback or address.is_unspecified:
            return match[0]
        return f"(IPv{address.version})"
