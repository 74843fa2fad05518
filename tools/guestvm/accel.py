"""Which accelerator works here: found out by booting the guest, remembered per host, QEMU and kernel."""

import os
import platform
import shutil
from pathlib import Path

from guestvm import cache
from guestvm.errors import LabError
from guestvm.kernel import Kernel
from guestvm.progress import Progress

PROBE_LIMIT = 30


def choose(source: Kernel, qemu: str, progress: Progress) -> str:
    """kvm if the guest boots and computes under it, else tcg.

    A KVM that can be opened may still be unable to run a stock kernel (nested virtualization with an
    incomplete instruction emulator), so opening /dev/kvm alone does not count.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        progress.say("accelerator: tcg (/dev/kvm cannot be opened)")
        return "tcg"
    key = cache.key_of([_host(), str(Path(shutil.which(qemu) or qemu).stat().st_mtime_ns), source.package])
    path = cache.entry("accel", key, lambda work: _probe(source, qemu, progress, work))
    answer = (path / "answer").read_text()
    name, _, reason = answer.partition("\n")
    progress.say(f"accelerator: {name} ({reason})")
    return name


def _host() -> str:
    cpu = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "flags"))
    ]
    return f"{platform.node()} {platform.release()} {cpu[:2]}"


def _probe(source: Kernel, qemu: str, progress: Progress, work: Path) -> None:
    from guestvm.machine import Machine

    with progress.step(f"trying KVM with kernel {source.series}"):
        try:
            with Machine(
                source.series,
                devices=[],
                accel="kvm",
                qemu=qemu,
                boot_limit=PROBE_LIMIT,
                limit=2 * PROBE_LIMIT,
                keep_log="never",
            ) as vm:
                vm.run(
                    ["python", "-c", "import numpy; numpy.ones((64, 64)) @ numpy.ones((64, 64))"], 20
                ).check()
            answer = "kvm\na guest booted and computed"
        except LabError as error:
            answer = f"tcg\nKVM is there but did not run a guest: {str(error).splitlines()[0]}"
    (work / "answer").write_text(answer)
