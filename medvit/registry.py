"""Networks by name. Architectures only: trained weights come with a bundle, never alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T", bound="Callable[..., Any]")
_MODELS: dict[str, Callable[..., Any]] = {}
# each is imported when its model is first asked for, so that `import medvit` stays light
_MODULES = {
    "classifier": "medvit.models.heads",
    "d_former": "medvit.models.d_former",
    "embedder": "medvit.models.heads",
    "hbformer": "medvit.models.hbformer",
    "mae": "medvit.models.mae",
    "rad_dino": "medvit.models.rad_dino",
    "segmenter": "medvit.models.heads",
    "swin_unetr": "medvit.models.swin_unetr",
    "uni4eye": "medvit.models.uni4eye",
    "uni4eye_mae": "medvit.models.uni4eye",
    "uni4eye_pp_mae": "medvit.models.uni4eye_pp",
    "vit": "medvit.models.vit",
}


def register(name: str) -> Callable[[T], T]:
    """Decorator that makes a class or builder available to :func:`create_model`.

    Raises:
        ValueError: the name is taken.
    """

    def add(builder: T) -> T:
        if name in _MODELS:
            raise ValueError(f"a model named {name!r} is registered already: {_MODELS[name]}")
        _MODELS[name] = builder
        return builder

    return add


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, sorted."""
    return sorted({*_MODULES, *_MODELS})


def model_class(name: str) -> Callable[..., Any]:
    """The class or builder registered under a name.

    Raises:
        ValueError: an unknown name; the nearest one is suggested.
    """
    if name not in _MODELS and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if name not in _MODELS:
        near = get_close_matches(name, list_models(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {list_models()}"
        raise ValueError(f"no model named {name!r}; {hint}")
    return _MODELS[name]


def create_model(name: str, **arguments: Any) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: one of :func:`list_models`.
        **arguments: the network's own constructor arguments, e.g. ``spatial_dims``, ``in_channels``.

    Raises:
        ValueError: an unknown name (the nearest one is suggested), or values the network refuses.
        TypeError: an argument the network does not have.
    """
    model: nn.Module = model_class(name)(**arguments)
    return model
