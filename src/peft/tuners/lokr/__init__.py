"""LoKr: Kronecker products of small matrices (Yeh et al. 2023, arXiv 2309.14859)."""

from .layer import Conv1d, Conv2d, Linear, LoKrConfig, LoKrLayer, LoKrModel, factorization

__all__ = ["Conv1d", "Conv2d", "Linear", "LoKrConfig", "LoKrLayer", "LoKrModel", "factorization"]
