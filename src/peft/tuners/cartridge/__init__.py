"""Cartridges: the keys and values of a text, trained to stand for it (Eyuboglu et al. 2025, arXiv 2506.06266)."""

from .model import CartridgeConfig, CartridgeEncoder, CartridgeModel

__all__ = ["CartridgeConfig", "CartridgeEncoder", "CartridgeModel"]
