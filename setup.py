"""The C extension is the only thing that pyproject.toml cannot say."""

from setuptools import setup

setup(cffi_modules=["native/build_engine.py:ffibuilder"])
