"""Only for the compiled part, ebdiff._C; everything else is in pyproject.toml. How it is built: build_tools/."""

import os
import sys

from setuptools import Extension, setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # absent under build isolation

from build_tools.command import Build, BuildCompiled
from build_tools.settings import read

try:
    settings = read(os.environ)
except ValueError as error:
    sys.exit(str(error))

# The sources are found by build_tools; the extension stands here so that a wheel gets a platform's name.
extensions = [] if settings.mode == "none" else [Extension("ebdiff._C", sources=[])]
setup(ext_modules=extensions, cmdclass={"build": Build, "build_ext": BuildCompiled})
