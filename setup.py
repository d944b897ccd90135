"""Only for the compiled part; everything else is in pyproject.toml.

Nothing is compiled yet: the sources in csrc/ will plug in here as ext_modules (ebdiff._C). They include no torch
headers, so that building needs no torch and works in pip's isolated build environment.
"""

from setuptools import setup

setup()
