"""Tests that run the GPU kernels in Triton's interpreter, which a process chooses before it imports Triton.

`tests/ops/test_gpu_kernels.py` runs them in a process of their own; elsewhere they are not collected.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
