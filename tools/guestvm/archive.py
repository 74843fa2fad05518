"""Debian's archive, asked with apt: the machine's own sources and state stay untouched."""

import os
import subprocess
from pathlib import Path

from guestvm.programs import run

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEFAULT_MIRROR = "http://deb.debian.org/debian"


class Archive:
    """One suite's packages, with lists of its own below `directory`.

    Raises:
        LabError: it cannot be reached, as whatever else is asked of it.
    """

    def __init__(self, directory: Path, suite: str, suites: frozenset[str]) -> None:
        for sub in ("parts", "state/lists/partial", "cache/archives/partial"):
            (directory / sub).mkdir(parents=True)
        mirror, keyring = _mirror(suites)
        self.name = f"{mirror} {suite}"
        self._directory = directory
        source = f"Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\nSigned-By: {keyring}\n"
        (directory / "parts" / "guestpv.sources").write_text(source)
        self._options = [
            "-qq",
            "-oDir::Etc::SourceList=/dev/null",
            f"-oDir::Etc::SourceParts={directory / 'parts'}",
            f"-oDir::State={directory / 'state'}",
            "-oDir::State::status=/dev/null",
            f"-oDir::Cache={directory / 'cache'}",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=3",
            "-oAPT::Install-Recommends=0",
            # The downloads lie below a home directory, which apt's own user cannot enter.
            f"-oAPT::Sandbox::User={'root' if os.geteuid() == 0 else ''}",
        ]
        run(["apt-get", *self._options, "update"], f"read the lists of {self.name}")

    def depends(self, package: str) -> list[str]:
        """What a package depends on."""
        said = run(["apt-cache", *self._options, "depends", "--important", package], f"ask {self.name}")
        return [line.split()[-1] for line in said.splitlines() if "Depends:" in line]

    def download(self, packages: list[str], target: Path) -> None:
        """Put the files of packages (NAME or NAME=VERSION) into `target`."""
        command = ["apt-get", *self._options, "download", *packages]
        run(command, f"fetch {' '.join(packages)} from {self.name}", cwd=target, timeout=900)

    def unpack_with_needs(self, package: str, target: Path) -> None:
        """Unpack a package, and all that it depends on, below `target`."""
        command = ["apt-get", *self._options, "-y", "--download-only", "install", package]
        run(command, f"fetch {package} from {self.name}", timeout=600)
        for file in sorted((self._directory / "cache" / "archives").glob("*.deb")):
            run(["dpkg-deb", "-x", str(file), str(target)], f"unpack {file.name}")


def _mirror(suites: frozenset[str]) -> tuple[str, str]:
    """URI and keyring of Debian's archive as the machine's own apt sources name it."""
    columns = "$(REPO_URI)\t$(RELEASE)\t$(SIGNED_BY)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", columns, "Created-By: Packages", "Component: main"],
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    for line in listing.splitlines():
        uri, release, keyring = line.split("\t")
        if release.strip("/") in suites:
            return uri, keyring if keyring.startswith("/") else KEYRING
    return DEFAULT_MIRROR, KEYRING
