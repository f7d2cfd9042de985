"""IA³: learned scales of keys, values and feed-forward activations (Liu et al. 2022, arXiv 2205.05638)."""

from .layer import Conv2d, Conv3d, IA3Config, IA3Layer, IA3Model, Linear

__all__ = ["Conv2d", "Conv3d", "IA3Config", "IA3Layer", "IA3Model", "Linear"]
