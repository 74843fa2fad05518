"""Fixtures that several unit tests share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[2] / "guestpv" / "core"
MODEL = Path(__file__).resolve().parent / "core_model"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core with relacy's atomics in place of ring memory; ten seconds to compile."""
    if not Path("/usr/include/relacy").exists() or shutil.which("g++") is None:
        pytest.fail("the model needs Debian's relacy-dev and g++: apt-get install relacy-dev g++")
    program = tmp_path_factory.mktemp("model") / "model"
    subprocess.run(
        ["g++", "-std=gnu++17", "-Og", "-w", f"-I{CORE}", f"-I{MODEL}", MODEL / "model.cpp", "-o", program],
        check=True,
        timeout=300,
    )
    return program
