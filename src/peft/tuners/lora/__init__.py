"""LoRA: low-rank updates of frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

from .config import LoraConfig, LoraRuntimeConfig
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from .model import LoraModel

__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig",
]  # fmt: skip
