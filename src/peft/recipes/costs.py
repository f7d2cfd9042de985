"""What a run costs, as this machine counts it."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> int:
    """Bytes at the peak so far: of the GPU where there is one, else of the whole process with its libraries and data."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
