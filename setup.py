"""The C core: compiled through cffi against Python's limited API, so one wheel serves every version."""

from setuptools import setup

setup(
    cffi_modules=["guestpv/core/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
