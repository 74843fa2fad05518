"""NBD's numbers against the kernel's headers, and the netlink codec."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from guestpv.wire import nbd as wire

NAMES = {
    "NLM_F_REQUEST": wire.NLM_F_REQUEST,
    "NLM_F_ACK": wire.NLM_F_ACK,
    "NLMSG_ERROR": wire.NLMSG_ERROR,
    "NLA_F_NESTED": wire.NLA_F_NESTED,
    "GENL_ID_CTRL": wire.GENL_ID_CTRL,
    "CTRL_CMD_GETFAMILY": wire.CTRL_CMD_GETFAMILY,
    "CTRL_ATTR_FAMILY_ID": wire.CTRL_ATTR_FAMILY_ID,
    "CTRL_ATTR_FAMILY_NAME": wire.CTRL_ATTR_FAMILY_NAME,
    "NBD_GENL_VERSION": wire.FAMILY_VERSION,
    **{f"NBD_CMD_{n}": getattr(wire, f"CMD_{n}") for n in ("CONNECT", "DISCONNECT", "RECONFIGURE")},
    "NBD_ATTR_INDEX": wire.ATTR_INDEX,
    "NBD_ATTR_SIZE_BYTES": wire.ATTR_SIZE_BYTES,
    "NBD_ATTR_BLOCK_SIZE_BYTES": wire.ATTR_BLOCK_SIZE_BYTES,
    "NBD_ATTR_TIMEOUT": wire.ATTR_TIMEOUT,
    "NBD_ATTR_SERVER_FLAGS": wire.ATTR_SERVER_FLAGS,
    "NBD_ATTR_CLIENT_FLAGS": wire.ATTR_CLIENT_FLAGS,
    "NBD_ATTR_SOCKETS": wire.ATTR_SOCKETS,
    "NBD_SOCK_ITEM": wire.SOCK_ITEM,
    "NBD_SOCK_FD": wire.SOCK_FD,
    "NBD_FLAG_HAS_FLAGS": wire.FLAG_HAS_FLAGS,
    "NBD_FLAG_READ_ONLY": wire.FLAG_READ_ONLY,
    "NBD_FLAG_SEND_FLUSH": wire.FLAG_SEND_FLUSH,
    "NBD_FLAG_SEND_FUA": wire.FLAG_SEND_FUA,
    "NBD_FLAG_SEND_TRIM": wire.FLAG_SEND_TRIM,
    "NBD_FLAG_CAN_MULTI_CONN": wire.FLAG_CAN_MULTI_CONN,
    "NBD_REQUEST_MAGIC": wire.REQUEST_MAGIC,
    "NBD_REPLY_MAGIC": wire.REPLY_MAGIC,
    "NBD_CMD_READ": wire.CMD_READ,
    "NBD_CMD_WRITE": wire.CMD_WRITE,
    "NBD_CMD_DISC": wire.CMD_DISC,
    "NBD_CMD_FLUSH": wire.CMD_FLUSH,
    "NBD_CMD_TRIM": wire.CMD_TRIM,
    "NBD_CMD_FLAG_FUA>>16": wire.CMD_FLAG_FUA,
    "sizeof(struct nbd_request)": wire.REQUEST.size,
    "sizeof(struct nbd_reply)": wire.REPLY.size,
    "sizeof(struct nlmsghdr)": wire.HEADER.size,
    "sizeof(struct genlmsghdr)": wire.GENERIC.size,
    "sizeof(struct nlattr)": wire.ATTRIBUTE.size,
}


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    headers = ("stdio", "linux/types", "linux/netlink", "linux/genetlink", "linux/nbd", "linux/nbd-netlink")
    if not shutil.which("cc") or not Path("/usr/include/linux/nbd-netlink.h").exists():
        pytest.skip("no C compiler or no kernel headers: apt install gcc linux-libc-dev")
    source = tmp_path / "numbers.c"
    source.write_text(
        "".join(f"#include <{name}.h>\n" for name in headers)
        + "int main(void) {\n"
        + "".join(f'printf("%llu\\n", (unsigned long long)({name}));\n' for name in NAMES)
        + "}\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "numbers", source], check=True)
    printed = subprocess.run([tmp_path / "numbers"], check=True, capture_output=True, text=True).stdout
    assert dict(zip(NAMES, map(int, printed.split()), strict=True)) == NAMES


def test_attributes_there_and_back() -> None:
    raw = wire.connect(5, 1 << 33, 4096, 3, [7, 9])
    found = wire.attributes(raw)
    assert struct.unpack("=I", found[wire.ATTR_INDEX]) == (5,)
    assert struct.unpack("=Q", found[wire.ATTR_SIZE_BYTES]) == (1 << 33,)
    items = found[wire.ATTR_SOCKETS]
    assert len(items) == 2 * 12
    first = wire.attributes(wire.attributes(items[:12])[wire.SOCK_ITEM])
    assert struct.unpack("=I", first[wire.SOCK_FD]) == (7,)
    assert wire.ATTR_INDEX not in wire.attributes(wire.connect(None, 512, 512, 1, []))


def test_messages_that_are_cut_short_end_the_walk() -> None:
    whole = wire.message(30, wire.CMD_CONNECT, 1, wire.attribute(1, b"abcde"), 77)
    assert [(kind, sequence) for kind, sequence, _ in wire.messages(whole + whole)] == [(30, 77)] * 2
    assert list(wire.messages(whole[:-1])) == []
    assert list(wire.messages(struct.pack("=IHHII", 3, 1, 0, 1, 0))) == []
    assert wire.attributes(struct.pack("=HH", 2, 1)) == {}
    assert wire.attributes(wire.attribute(9, b"x")[:4]) == {}
