"""Builds the C core ``guestpv.core._core``: cffi in API mode, limited API, so one abi3 file per machine."""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wno-unused-parameter"]

FROM_C = """
extern "Python" int32_t gpv_python_kick(void *user, uint32_t value);
"""
"""What a kick of kind GPV_KICK_CALL calls to tell Python."""

OBSERVING = """
enum gpv_saw { GPV_SAW_LOAD, GPV_SAW_LOAD_ACQUIRE, GPV_SAW_STORE, GPV_SAW_STORE_RELEASE, GPV_SAW_FENCE };
struct gpv_access { int32_t what; uint32_t width; uint64_t address; uint64_t value; };
typedef void (*gpv_hook)(void *user, const struct gpv_access *access);
void gpv_hook_set(struct gpv_queue *q, gpv_hook hook, void *user);
void gpv_trace_set(struct gpv_queue *q, gpv_hook trace, void *user);
extern "Python" void gpv_python_access(void *user, const struct gpv_access *access);
"""
"""What the observing build has more: hooks at each access to shared memory; see ``observe.h``."""


def make(module: str, *, observing: bool = False) -> FFI:
    """The cffi builder of the core. Every ``X.cdef.h`` is declared to cffi and has a header ``X.h``."""
    builder = FFI()
    declared = sorted(HERE.glob("*.cdef.h"))
    headers = [path.name.removesuffix(".cdef.h") for path in declared] + ["observe"] * observing
    builder.cdef("".join(path.read_text() for path in declared) + FROM_C + OBSERVING * observing)
    builder.set_source(
        module,
        "".join(f'#include "{name}.h"\n' for name in headers),
        sources=[os.path.relpath(path) for path in sorted(HERE.glob("*.c")) if not path.name.startswith("_")],
        include_dirs=[str(HERE)],
        depends=[str(path) for path in sorted(HERE.glob("*.h"))],
        define_macros=[("GPV_OBSERVING", "1")] * observing,
        extra_compile_args=["-std=gnu11", "-O2", "-fvisibility=hidden", *WARNINGS],
        py_limited_api=True,
    )
    return builder


ffibuilder = make("guestpv.core._core")
observing = make("guestpv.core._observing", observing=True)
