"""Programs that the lab runs on the host."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from guestvm.errors import LabError


def run(command: Sequence[str], what: str, cwd: Path | None = None, timeout: float = 300) -> str:
    """What a program prints.

    Raises:
        LabError: it cannot do `what`: it is missing, fails or takes too long.
    """
    # Debian's ordinary users have no sbin in PATH, where depmod is.
    env = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)
    except FileNotFoundError:
        raise LabError(f"cannot {what}: {command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"cannot {what}: {command[0]} did not end within {timeout:.0f} s") from None
    if done.returncode != 0:
        raise LabError(f"cannot {what}: {' '.join(command[:2])} failed:\n{done.stderr.strip()[-4000:]}")
    return done.stdout
