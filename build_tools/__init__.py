"""How ebdiff._C is built from csrc/. setup.py calls it with setuptools, pybind11 and ninja alone: no torch."""
