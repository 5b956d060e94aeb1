"""medvit: exact 2D/3D vision-transformer encoders, windowed attention and MONAI bundles that keep the geometry."""

from medvit.registry import create_model, list_models

__version__ = "0.1.0"
__all__ = ["create_model", "list_models"]
