"""Bottleneck adapters: a small network after a layer or beside it (Houlsby, Pfeiffer, parallel, Compacter)."""

from .config import BottleneckConfig
from .layer import BottleneckLayer, BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
