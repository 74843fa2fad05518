"""A process without any capability carries packets over a link that root made for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NO_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
ASK = ["net", "up", "loopback:net", "--no-address"]
WITHOUT = """
ip link set lo up
guestpv() {{ {rights} {python} -m guestpv "$@" 2>&1; echo "= $?"; }}
guestpv {ask}
ip tuntap add pv0 mode tap user root
guestpv {ask} --name pv0
ip link set pv0 up mtu 9000
guestpv {ask} --name pv0
ip link set pv0 mtu 1500
guestpv {ask} --name pv0 --detach >/dev/null
link() {{ ip -o link show pv0 | grep -oE 'LOWER_UP|NO-CARRIER|ether [0-9a-f:]+'; }}
link
guestpv net down
link
"""


def test_a_lent_link_needs_no_capability(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.fail("network namespaces need root: run the tests with sudo", pytrace=False)
    script = WITHOUT.format(rights=" ".join(NO_RIGHTS), python=sys.executable, ask=" ".join(ASK))
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", script],
        env={**os.environ, "RUNTIME_DIRECTORY": str(tmp_path / "r")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.count("= 4\n") == 3, (done.stdout, done.stderr)
    no_link, down, long, *up = done.stdout.split("= 4\n")
    assert "error: not allowed to make the TAP link" in no_link
    assert "ip tuntap add pv0 mode tap user $USER" in no_link
    assert "as root: ip link set pv0 up" in down
    assert "as root: ip link set pv0 mtu 1500" in long
    mac = "ether 52:54:00:00:00:01"
    assert up == [f"LOWER_UP\n{mac}\npv0 is down.\n= 0\nNO-CARRIER\n{mac}\n"], (up, done.stderr)
