"""Attention over token grids: one geometry, one call, interchangeable backends."""

from medvit.kernels.attention import windowed_attention
from medvit.kernels.windows import WindowGeometry

__all__ = ["WindowGeometry", "windowed_attention"]
