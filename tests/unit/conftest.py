import os

import torch

# Read when triton is imported, which collecting the tests of kernels does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def mend_interpreter():
    """Let a loop of an interpreted kernel have a bound that the kernel has computed.

    The interpreter keeps a number as an array of one, which numpy 2.4 no longer takes for an index.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if os.environ.get("TRITON_INTERPRET") == "1":
    mend_interpreter()
