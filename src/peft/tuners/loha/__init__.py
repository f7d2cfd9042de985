"""LoHa: Hadamard products of two low-rank updates (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""

from .layer import Conv1d, Conv2d, Linear, LoHaConfig, LoHaLayer, LoHaModel

__all__ = ["Conv1d", "Conv2d", "Linear", "LoHaConfig", "LoHaLayer", "LoHaModel"]
