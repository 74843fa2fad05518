"""Builds the C core ``guestpv.core._core``: cffi in API mode, limited API, so one abi3 file per machine."""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wno-unused-parameter"]

PYTHON_KICK = """
extern "Python" int32_t gpv_python_kick(void *user, uint32_t value);
"""
"""What a kick of kind GPV_KICK_CALL calls to tell Python."""


def make(module: str, macros: list[tuple[str, str | None]]) -> FFI:
    """The cffi builder of the core. Every ``X.cdef.h`` is declared to cffi and has a header ``X.h``."""
    builder = FFI()
    declared = sorted(HERE.glob("*.cdef.h"))
    builder.cdef("".join(path.read_text() for path in declared) + PYTHON_KICK)
    builder.set_source(
        module,
        "".join(f'#include "{path.name.removesuffix(".cdef.h")}.h"\n' for path in declared),
        sources=[os.path.relpath(path) for path in sorted(HERE.glob("*.c")) if path.name != "_core.c"],
        include_dirs=[str(HERE)],
        depends=[str(path) for path in sorted(HERE.glob("*.h"))],
        define_macros=macros,
        extra_compile_args=["-std=gnu11", "-O2", *WARNINGS],
        libraries=["pthread"],
        py_limited_api=True,
    )
    return builder


ffibuilder = make("guestpv.core._core", [])
