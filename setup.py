"""Declares the optional C extension; everything else about the package is in pyproject.toml.

Without a C compiler the install goes on and `glm5.ops.selection` uses PyTorch's operators.
"""

import sysconfig

from setuptools import Extension, setup

lightning = Extension(
    "glm5.ops._lightning",
    ["glm5/ops/csrc/lightning.c"],
    depends=["glm5/ops/csrc/lightning_kernel.h"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    extra_compile_args=["-O3", "-pthread"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,
)
# The free-threaded build has no stable interface: there the extension fails to compile and is left out.
wheel_tag = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}}

setup(ext_modules=[lightning], options=wheel_tag)
