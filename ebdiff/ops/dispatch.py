"""Does anyone but the kernels listen when an operator is called?"""

from __future__ import annotations

import torch

__all__ = ["is_listened_to"]


def is_listened_to() -> bool:
    """Under torch.compile, torch.jit.trace, a mode (fake tensors among them) or a transform of torch.func.

    What is made there may be no memory at all, so nothing of it may be remembered.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
