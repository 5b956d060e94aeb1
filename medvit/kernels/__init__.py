"""Attention over token grids: one geometry, one call, interchangeable backends."""

from medvit.kernels.attention import explain, windowed_attention
from medvit.kernels.bias import BiasTable
from medvit.kernels.windows import WindowGeometry

__all__ = ["BiasTable", "WindowGeometry", "explain", "windowed_attention"]
