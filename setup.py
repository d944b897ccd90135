"""Nothing is compiled yet; the C++ and CUDA part (csrc/) plugs in here as ext_modules."""

from setuptools import setup

setup()
