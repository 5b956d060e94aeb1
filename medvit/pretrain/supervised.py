"""Training with labels as an objective, so that fine-tuning has what pre-training has: exact resume, guard, log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from medvit.pretrain.objective import Losses, image_of


class Supervised(nn.Module):
    """A network with an ``encoder`` and a loss between what it makes of ``image`` and ``label``.

    Args:
        network: of logits; fresh, or with a pre-trained encoder.
        loss: logits, float32, and labels to a scalar; e.g. ``torch.nn.CrossEntropyLoss()`` or MONAI's ``DiceCELoss``.

    Raises:
        ValueError: in ``forward``, a batch without image or label.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.network, self.loss = network, loss

    @property
    def encoder(self) -> Any:
        """The network's encoder; the network itself if it has none."""
        return getattr(self.network, "encoder", self.network)

    @property
    def exports(self) -> dict[str, nn.Module]:
        """The whole network is what a training with labels is for."""
        return {"network": self.network}

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> Losses:
        """The loss; it is all there is."""
        return Losses(self.loss(self.network(image_of(batch, "image")).float(), image_of(batch, "label")), {})

    def after_step(self, progress: float) -> None:
        """Nothing: there is no teacher."""
