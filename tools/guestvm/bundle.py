"""A kernel and an initramfs that check a hypervisor's virtio devices, for `./tools/guest bundle`."""

import shutil
import stat
from pathlib import Path

from guestvm import image
from guestvm import kernel as kernels
from guestvm.errors import LabError
from guestvm.progress import Progress

MODULES = ("loop", "squashfs", "overlay")
"""What reaches the root, which lies in the initramfs itself."""

VIRTIO_MODULES = ("virtio_pci", "virtio_console", "virtio_iommu")
"""Loaded where the console or the IOMMU is virtio's own; otherwise nothing but the suite touches a device."""

USE = """\
{directory}: kernel {release}, and an initramfs of {size:.0f} MB; 1 GiB of memory is enough.
Without guestpv.conform= every virtio function is checked. Under QEMU:
  qemu-system-x86_64 -m 1G -display none -serial stdio -no-reboot \\
    -machine q35,kernel-irqchip=split -device intel-iommu,intremap=on \\
    -kernel {directory}/vmlinuz -initrd {directory}/initrd.img \\
    -append 'console=ttyS0 panic=-1 intel_iommu=on guestpv.conform="device all --select DEV-PCI"' \\
    -device virtio-rng-pci,disable-legacy=on,iommu_platform=on"""


def build(series: str, directory: Path, progress: Progress) -> str:
    """Write vmlinuz, vmlinux (if it can be had) and initrd.img; how they are used.

    Raises:
        LabError: something is missing, or `directory` cannot be written to.
    """
    source = kernels.get(series, progress)
    root = image.root(source, progress)
    with progress.step("writing the bundle"):
        initrd = _archive(source, root) + image.checkout(("guestpv", "tools/guestvm/suite.py"))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "initrd.img").write_bytes(initrd)
            for name in ("vmlinuz", "vmlinux"):
                if (source.directory / name).exists():
                    shutil.copy(source.directory / name, directory / name)
        except OSError as error:
            raise LabError(f"cannot write the bundle to {directory}: {error.strerror}") from None
    return USE.format(directory=directory, release=source.release, size=len(initrd) / 1e6)


def _archive(source: kernels.Kernel, root: Path) -> bytes:
    archive = image.Cpio()
    for name in ("bin", "modules", "virtio"):
        archive.add(name, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, image.busybox().read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, (Path(__file__).parent / "bundle.sh").read_bytes())
    archive.add("root.squashfs", stat.S_IFREG | 0o644, root.read_bytes())
    for folder, names in (("modules", MODULES), ("virtio", VIRTIO_MODULES)):
        for number, path in enumerate(kernels.closure(source, names)):
            name = f"{folder}/{number:02}-{path.name.split('.ko')[0]}.ko"
            archive.add(name, stat.S_IFREG | 0o644, kernels.read_module(source.modules / path))
    return archive.finish()
