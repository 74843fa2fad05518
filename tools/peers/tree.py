"""Programs of a newer Debian, unpacked beside the machine's own and run through their own loader.

Nothing is installed and no root is needed: apt resolves and downloads with options and state of its own, and
dpkg-deb unpacks.
"""

import gzip
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guestvm import cache
from peers.errors import PeerError

MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
FORMAT = "2"
LOADER = "usr/lib64/ld-linux-x86-64.so.2"
UNUSED = (
    "usr/lib/x86_64-linux-gnu/*.a",
    "usr/share/man",
    "usr/share/locale",
    "usr/lib/python3*",
    "usr/share/perl",
    "usr/lib/x86_64-linux-gnu/perl*",
)
"""What no program run from here reads, most of the size."""
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib", "usr/lib/x86_64-linux-gnu/blas")


@dataclass(frozen=True)
class Recipe:
    """What a tree is made of: Debian suite and the packages named; what they depend on comes along.

    Another architecture's programs run in qemu-user, which is given the tree as its root (``-L``).
    """

    suite: str
    packages: tuple[str, ...]
    architecture: str = ""

    @property
    def key(self) -> str:
        """Name of the result in the cache."""
        foreign = (self.architecture,) if self.architecture else ()
        return cache.key_of((FORMAT, self.suite, *self.packages, *foreign))


RECIPES = {
    "peers": Recipe(
        "trixie",
        (
            "passt",
            "qemu-utils",
            "libblkio-dev",
            "dpdk-dev",
            "librte-net-vhost25",
            "librte-net-virtio25",
            "librte-net-ring25",
            "librte-mempool-ring25",
        ),
    ),
    "qemu": Recipe("trixie-backports", ("qemu-system-x86", "qemu-utils", "ovmf", "ipxe", "u-boot-qemu")),
    "qemu-10": Recipe("trixie", ("qemu-system-x86",)),
    "aarch64": Recipe("trixie", ("python3", "libstdc++6", "libudev1"), "arm64"),
}
"""Name -> recipe: the peers that tests and benchmarks run against, the newest QEMU with firmware, Debian 13's
own QEMU, and a Python to try the aarch64 wheel with."""


@dataclass(frozen=True)
class Tree:
    """An unpacked tree."""

    root: Path

    def program(self, name: str) -> list[str]:
        """Command that runs a program of the tree with the tree's libraries.

        Raises:
            PeerError: the tree has no such program.
        """
        for directory in ("usr/bin", "usr/sbin", "usr/libexec"):
            path = self.root / directory / name
            if path.is_file():
                libraries = ":".join(str(self.root / part) for part in LIBRARIES)
                return [str(self.root / LOADER), "--library-path", libraries, "--argv0", name, str(path)]
        raise PeerError(f"{name} is not in {self.root}: ./tools/get-peers --refresh builds the tree anew")

    def qemu(self, home: Path) -> Path:
        """A program in ``home`` that runs the tree's QEMU with the tree's libraries, modules and firmware."""
        name = "qemu-system-x86_64"
        share = self.root / "usr" / "share"
        modules = shlex.quote(str(self.root / "usr" / "lib" / "x86_64-linux-gnu" / "qemu"))
        command = [*self.program(name), "-L", str(share / "qemu"), "-L", str(share / "seabios")]
        script = home / name
        script.write_text(f'#!/bin/sh\nexport QEMU_MODULE_DIR={modules}\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        # What accelerator works is remembered by the program's age.
        age = (self.root / "usr" / "bin" / name).stat().st_mtime_ns
        os.utime(script, ns=(age, age))
        return script

    def version(self, package: str) -> str:
        """The version of a package of the tree, from its changelog."""
        with gzip.open(self.root / "usr" / "share" / "doc" / package / "changelog.Debian.gz", "rt") as text:
            return text.readline().partition("(")[2].partition(")")[0]


def get(name: str, *, refresh: bool = False) -> Tree:
    """The tree called ``name``, downloaded and unpacked unless the cache has it.

    Raises:
        PeerError: there is no such recipe, or the archive does not give what it asks for.
    """
    if name not in RECIPES:
        raise PeerError(f"there is no tree {name}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if refresh:
        shutil.rmtree(cache.root() / "peers" / recipe.key, ignore_errors=True)
    return Tree(cache.entry("peers", recipe.key, lambda work: _build(recipe, work)) / "root")


def _build(recipe: Recipe, work: Path) -> None:
    apt = work / "apt"
    for part in ("parts", "state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    base = recipe.suite.removesuffix("-backports")
    suites = " ".join(dict.fromkeys((base, recipe.suite)))
    (apt / "parts" / "peers.sources").write_text(
        f"Types: deb\nURIs: {MIRROR}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    options = [
        "-qq",
        "-y",
        "-oDir::Etc::SourceList=/dev/null",
        f"-oDir::Etc::SourceParts={apt / 'parts'}",
        "-oDir::Etc::Preferences=/dev/null",
        "-oDir::Etc::PreferencesParts=/dev/null",
        f"-oDir::State={apt / 'state'}",
        "-oDir::State::status=/dev/null",
        f"-oDir::Cache={apt / 'cache'}",
        "-oAcquire::Languages=none",
        "-oAcquire::Retries=3",
        "-oAPT::Install-Recommends=0",
        f"-oAPT::Default-Release={recipe.suite}",
        *(
            f"-oAPT::{name}={recipe.architecture}"
            for name in ("Architecture", "Architectures")
            if recipe.architecture
        ),
        # apt's own user cannot enter directories below a home.
        f"-oAPT::Sandbox::User={'root' if os.geteuid() == 0 else ''}",
    ]
    _run(["apt-get", *options, "update"])
    _run(["apt-get", *options, "--download-only", "install", *recipe.packages], timeout=1200)
    root = work / "root"
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)])
    shutil.rmtree(apt)
    if recipe.architecture:
        # Programs look for their loader in /lib, which on a machine is a link that no package has.
        if not (root / "lib").exists():
            (root / "lib").symlink_to("usr/lib")
        return
    for pattern in UNUSED:
        for path in list(root.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not (root / LOADER).exists():
        raise PeerError(f"the tree of {recipe.suite} has no {LOADER}")


def _run(command: Sequence[str], timeout: float = 300) -> None:
    if shutil.which(command[0]) is None:
        raise PeerError(f"{command[0]} is missing: the peers come from Debian's archive")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise PeerError(
            f"{' '.join(command[:1])} took more than {timeout:g} s: is {MIRROR} reachable?"
        ) from None
    if done.returncode:
        raise PeerError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
