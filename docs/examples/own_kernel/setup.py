"""Builds gated_attention.pyx:  python setup.py build_ext --inplace   (needs Cython and setuptools)"""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

import cllm

# Cython looks for cllm/capi.pxd here; an editable install is on no path that it would search by itself.
where = str(Path(cllm.__file__).parents[1])
extension = Extension("gated_attention", ["gated_attention.pyx"])
setup(name="gated-attention", ext_modules=cythonize([extension], include_path=[where], build_dir="build"))
