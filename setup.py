"""The C core, compiled through cffi against Python's limited API, so one wheel serves every version.

It is built twice: the ordinary one, and one that shows every access to ring memory to an observer.
"""

from setuptools import setup

setup(
    cffi_modules=["guestpv/core/build.py:ffibuilder", "guestpv/core/build.py:observing"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
