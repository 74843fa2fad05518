"""What runs in the guest during a soak, as source text."""

from __future__ import annotations

from typing import Final

BREAKABLE: Final = '''
"""guestpv, whose device is broken by SIGUSR1 (a ring that cannot be) and reset behind its back by SIGUSR2."""
import gc, pathlib, signal, time
from guestpv.cli import restarts
from guestpv.transport.pci import PciTransport

def break_it(number, frame):
    for transport in [one for one in gc.get_objects() if isinstance(one, PciTransport) and one.queues]:
        pathlib.Path("/tmp/broken").write_text(str(time.monotonic()))
        if number == signal.SIGUSR2:
            transport.common.write("device_status", 0)
            continue
        # A queue at rest, as nobody but us may write to it meanwhile: the last one of a network device is
        # its control queue, the disk has no load, and this thread is the one that fills the balloon's.
        index = max(transport.queues) if transport.device_type == 1 else 0
        queue = transport.queues[index]
        idx = int(queue.rings.avail["idx"])
        queue.rings.avail["ring"][idx % queue.size] = 0xFFFF
        queue.rings.avail["idx"] = idx + 1 & 0xFFFF
        transport.common.write("queue_select", index)
        at = transport.common.read("queue_notify_off") * transport._notify.extra
        transport.function.bar(transport._notify.bar).write(transport._notify.offset + at, 2, index)

restarts.MOST = 1 << 30
signal.signal(signal.SIGUSR1, break_it)
signal.signal(signal.SIGUSR2, break_it)
from guestpv.cli.main import main
main()
'''

BREAK: Final = '''
"""Break the device of a service, and wait until it was restarted: JSON with what the service said when."""
import json, os, pathlib, signal, sys, time
from guestpv.services.control import ask
service, number = sys.argv[1], getattr(signal, f"SIG{sys.argv[2]}")
place = pathlib.Path("/run/guestpv", "" if service == "net" else service)
(path,) = [path for path in place.glob("*.sock") if not path.name.endswith(".capture.sock")]
log, pid = path.with_suffix(".log"), ask(path, "status", 120)["pid"]
said = len(log.read_text())
broken = pathlib.Path("/tmp/broken")
broken.unlink(missing_ok=True)
os.kill(pid, number)
begun, seen = time.monotonic(), None
# Those that rest go on while the device is broken.
pathlib.Path("/tmp/rest").unlink(missing_ok=True)
while True:
    now, new = time.monotonic(), log.read_text()[said:]
    if seen is None and " restart " in new:
        seen = now
    if "the device was reset and goes on" in new:
        break
    if now - begun > 200:
        sys.exit(f"{service} was not restarted; it said: {new}")
    time.sleep(0.02)
status = ask(path, "status", 120)
# It takes a moment from the signal to the break.
begun = float(broken.read_text())
print(json.dumps({"seen": seen - begun, "mended": now - begun, "reason": status["restarts"]["reason"]}))
'''

ECHO: Final = '''
"""Echo server, in the network namespace of the host's side."""
import socket, sys, threading
def serve(conn):
    try:
        with conn:
            while data := conn.recv(65536):
                conn.sendall(data)
    except OSError:
        pass
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
'''

TALK: Final = '''
"""Echoes of changing sizes over TCP; a connection that broke is made anew. A line of JSON every 2 s."""
import json, os, random, socket, sys, time
host, port = sys.argv[1], int(sys.argv[2])
choose, rounds, broken, conn = random.Random(1), 0, 0, None
while True:
    times, until = [], time.monotonic() + 2
    while time.monotonic() < until:
        while os.path.exists("/tmp/rest"):
            open("/tmp/talk-rests", "w").close()
            time.sleep(0.05)
        if os.path.exists("/tmp/talk-rests"):
            os.remove("/tmp/talk-rests")
        block = rounds.to_bytes(8, "little") * choose.choice((8, 180, 1024, 8192))
        begun = time.monotonic()
        try:
            if conn is None:
                conn = socket.create_connection((host, port), timeout=60)
            conn.sendall(block)
            back = b""
            while len(back) < len(block):
                piece = conn.recv(65536)
                if not piece:
                    raise OSError("closed")
                back += piece
        except OSError as error:
            print(json.dumps({"lost": str(error)}), flush=True)
            broken += 1
            conn = None
            time.sleep(0.5)
            continue
        if back != block:
            print(json.dumps({"changed": rounds}), flush=True)
            sys.exit(1)
        rounds += 1
        times.append(time.monotonic() - begun)
    times.sort()
    middle = times[len(times) // 2] * 1e3 if times else None
    print(json.dumps({"rounds": rounds, "broken": broken, "ms": middle}), flush=True)
'''

DISK: Final = """
while true; do
    while [ -e /tmp/rest ]; do : > /tmp/disk-rests; sleep 0.1; done
    rm -f /tmp/disk-rests
    fio --name=load --filename=/dev/nbd0 --ioengine=libaio --direct=1 --rw=randrw --bsrange=4k-64k \\
        --iodepth=8 --size=%(size)d --io_size=%(size)d --fsync=32 --verify=crc32c --verify_fatal=1 \\
        --randrepeat=0 --output-format=json --output=/tmp/fio.json || { echo '{"failed": 1}'; exit 1; }
    python3 -c 'import json; j = json.load(open("/tmp/fio.json"))["jobs"][0]
print(json.dumps({"verified": 1, "ms": j["write"]["clat_ns"]["mean"] / 1e6}))'
done
"""

PROBE: Final = '''
"""What the services say, and what their processes hold."""
import json, os, pathlib, time
from guestpv.services.control import ask

found = {}
for name, place in (("net", ""), ("blk", "blk"), ("balloon", "balloon")):
    for path in pathlib.Path("/run/guestpv", place).glob("*.sock"):
        if path.name.endswith(".capture.sock"):
            continue
        try:
            status = ask(path, "status", 60)
        except Exception as error:
            found[name] = {"error": str(error)}
            continue
        if "pid" not in status:
            found[name] = {"error": str(status)}
            continue
        status.pop("events", None)
        found[name] = status
# Whoever asks is answered by a thread, which ends a moment later.
time.sleep(0.5)
for status in found.values():
    if "pid" in status:
        pid = status["pid"]
        words = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status").read().splitlines())
        maps = open(f"/proc/{pid}/maps").readlines()
        status["process"] = {
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "mappings": len(maps),
            "device_mappings": sum("vfio" in line for line in maps),
            "resident_kib": int(words["VmRSS"].split()[0]),
            "pinned_kib": int(words.get("VmPin", "0").split()[0]) + int(words["VmLck"].split()[0]),
            "threads": int(words["Threads"]),
        }
print(json.dumps(found))
'''
