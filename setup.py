"""Declares the optional C extensions; everything else about the package is in pyproject.toml.

Without a C compiler the install goes on and `glm5` uses PyTorch's operators.
"""

import sysconfig
from pathlib import Path

from setuptools import Extension, setup


def extension(name: str) -> Extension:
    return Extension(
        f"glm5.ops._{name}",
        [f"glm5/ops/csrc/{name}.c"],
        depends=sorted(str(header) for header in Path("glm5/ops/csrc").glob("*.h")),
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        extra_compile_args=["-O3", "-pthread"],
        extra_link_args=["-pthread"],
        py_limited_api=True,
        optional=True,
    )


# The free-threaded build has no stable interface: there the extensions fail to compile and are left out.
wheel_tag = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}}

setup(ext_modules=[extension("lightning"), extension("decoding")], options=wheel_tag)
