"""Name servers of a link: told to systemd-resolved where it runs, else written into ``/etc/resolv.conf``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from ..errors import GuestpvError
from ..system import SYSTEM, System

RESOLV_CONF: Final = Path("/etc/resolv.conf")
RESOLVED: Final = Path("/run/systemd/resolve")
_BLOCK: Final = re.compile(r"# guestpv (\S+) begin\n.*?# guestpv \1 end\n", re.DOTALL)


class Resolver:
    """The name servers that one link brings; ``restore`` takes them away again.

    In ``resolv.conf`` they stand in a marked block before what was there, so that the edits of others
    survive, and a block left behind by a killed process is recognised by its link that is gone.
    """

    def __init__(
        self,
        ifname: str,
        *,
        resolv_conf: Path = RESOLV_CONF,
        resolved: Path = RESOLVED,
        links: Path = Path("/sys/class/net"),
        system: System = SYSTEM,
    ) -> None:
        self._ifname = ifname
        self._file = resolv_conf
        self._resolved = resolved.is_dir() and shutil.which("resolvectl") is not None
        self._links = links
        self._system = system
        self._applied: tuple[tuple[str, ...], str | None] | None = None
        self._created = False

    def apply(self, servers: tuple[str, ...], domain: str | None) -> None:
        """Use these name servers; with none of them nothing is touched.

        Raises:
            GuestpvError: resolvectl failed.
            OSError: resolv.conf cannot be written.
        """
        if (servers, domain) == self._applied or not servers:
            return
        if self._resolved:
            self._resolvectl("dns", self._ifname, *servers)
            if domain:
                self._resolvectl("domain", self._ifname, domain)
        else:
            lines = [f"# guestpv {self._ifname} begin", *([f"search {domain}"] if domain else [])]
            lines += [*(f"nameserver {server}" for server in servers), f"# guestpv {self._ifname} end", ""]
            self._created = self._created or not self._file.exists()
            self._write("\n".join(lines) + self._others())
        self._applied = (servers, domain)

    def restore(self) -> None:
        """Take the name servers away again, if ``apply`` brought any. Idempotent."""
        if self._applied is None:
            return
        self._applied = None
        if self._resolved:
            if (self._links / self._ifname).exists():
                self._resolvectl("revert", self._ifname)
            return
        others = self._others()
        if self._created and not others.strip():
            self._file.unlink(missing_ok=True)
        else:
            self._write(others)

    def _others(self) -> str:
        """What is in the file apart from our own block and those of links that are gone."""
        text = self._file.read_text() if self._file.exists() else ""

        def keep(block: re.Match[str]) -> str:
            alive = block[1] != self._ifname and (self._links / block[1]).exists()
            return block[0] if alive else ""

        return _BLOCK.sub(keep, text)

    def _write(self, text: str) -> None:
        # In place and not by rename: the file may be a link, or mounted by itself in a container.
        self._file.write_text(text)

    def _resolvectl(self, *words: str) -> None:
        status, output = self._system.run(["resolvectl", *words])
        if status:
            raise GuestpvError(f"resolvectl {' '.join(words)}: {output or f'exit status {status}'}")
