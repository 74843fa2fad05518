"""The bundle for authors of hypervisors: booted as they would, it says what it found and powers off."""

import re
import subprocess
from pathlib import Path

import pytest

from guestvm import accel, bundle, line
from guestvm import kernel as kernels
from guestvm.progress import Progress
from guestvm.suite import BEGIN, END

from .conftest import once

MODERN = "virtio-rng-pci,disable-legacy=on"


@once
@pytest.mark.timeout(1500)
def test_a_bundle_checks_what_the_command_line_names(kernel: str, tmp_path: Path) -> None:
    if kernel != "6.12":
        pytest.skip("one boot is enough: GUESTPV_KERNELS=6.12")
    said = bundle.build(kernel, tmp_path, Progress(quiet=True))
    assert str(tmp_path / "initrd.img") in said
    kind = accel.choose(kernels.get(kernel, Progress(quiet=True)), line.QEMU, Progress(quiet=True))
    append = f'{line.APPEND} intel_iommu=on guestpv.conform="device all --select DEV-STATUS-05,DEV-STATUS-06"'
    command = [line.QEMU, "-accel", kind, "-cpu", "max", "-m", "1G", "-smp", "2", "-no-reboot"]
    command += ["-machine", "q35,kernel-irqchip=split", "-device", "intel-iommu,intremap=on"]
    command += ["-nodefaults", "-display", "none", "-serial", "stdio", "-append", append]
    command += ["-kernel", str(tmp_path / "vmlinux"), "-initrd", str(tmp_path / "initrd.img")]
    command += ["-device", f"{MODERN},iommu_platform=on,addr=4", "-device", f"{MODERN},addr=5"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1400, stdin=subprocess.DEVNULL, check=True
    )
    text = done.stdout.replace("\r", "")
    report = text.partition(BEGIN)[2].partition(END.format(1))[0].strip().splitlines()
    assert report, text[-2000:]
    assert report[0] == "TAP version 14"
    points = [line for line in report if re.match(r"(not )?ok ", line)]
    assert report[-1] == f"1..{len(points)}"
    assert [line.split()[-1] for line in points if "0000:00:04.0" in line].count("(DEV-STATUS-06)") >= 2
    # An IOMMU alone is not enough: the device has to be told to use it.
    assert [line for line in points if line.startswith("not ok")] == [
        f"not ok {len(points)} - 0000:00:05.0 rng open"
    ]
    assert "iommu_platform" in "".join(report)
