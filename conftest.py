"""Files that pytest must not collect."""

import importlib.util

# Kernels are no modules to import, nor doctests to run, where Triton is not installed.
collect_ignore = [] if importlib.util.find_spec("triton") else ["src/d2f/ops/triton"]
