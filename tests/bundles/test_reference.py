"""The shipped weights on a fixed input: version rot, of torch or of our own code, is seen the day it happens."""

from __future__ import annotations

import pytest
import torch
from bundle_synthetic import BUNDLES

from medvit.bundle import find_bundle

# Of the logits of each class: mean, standard deviation and the value in the middle, recorded with torch 2.15 on a CPU.
# Of an image as a whole: the logits; of an embedding: mean, standard deviation, first and middle value, for each rank
# of image that the network takes.
# Not a measure of quality: the input is no image of a brain.
EXPECTED = {
    "cxr_mae": [[-0.7218], [0.7218]],
    "cxr_rad_dino": [[-0.0019, 1.0174, 0.5861, 0.1368]],
    "hippocampus_d_former": [[5.8155, 0.0454, 5.6319], [-4.0257, 0.2609, -5.014], [-3.3595, 0.1961, -2.3212]],
    "hippocampus_swin_unetr": [[6.1958, 1.8121, 4.4246], [-6.3136, 1.9832, -4.4594], [-6.1296, 1.8096, -6.1342]],
    "retina_hbformer": [[3.2372, 1.5158, 3.0402], [-4.0005, 1.7924, -3.9203]],
    "uni4eye": [[-0.0011, 1.0078, -0.6917, 0.0208], [-0.0021, 0.9983, 0.4594, -0.5388]],
}


def wave(size: tuple[int, ...], channels: int) -> torch.Tensor:
    """A smooth image ``(1, channels, *size)`` of mean 0 and standard deviation 1, the same on every machine."""
    axes = [torch.linspace(0, 1, n, dtype=torch.float64) for n in (*size, 1)[:3]]
    i, j, k = torch.meshgrid(axes, indexing="ij")
    image = torch.sin(9 * i + 2 * j) + torch.cos(11 * j - 3 * k) * (1 + k) + torch.sin(40 * i * k) / 4
    image = ((image - image.mean()) / image.std()).float().reshape(1, 1, *size)
    return torch.cat([image.roll(16 * channel, 2) for channel in range(channels)], 1)


def rows(pred: torch.Tensor) -> list[list[float]]:
    """What is recorded of the output for one image, see :data:`EXPECTED`."""
    if pred.dim() == 1 and len(pred) > 16:
        return [[float(v) for v in (pred.mean(), pred.std(), pred[0], pred[len(pred) // 2])]]
    if pred.dim() == 1:
        return [[float(v)] for v in pred]
    middle, flat = pred[(slice(None), *[n // 2 for n in pred.shape[1:]])], pred.flatten(1)
    return [[float(v) for v in row] for row in zip(flat.mean(1), flat.std(1), middle, strict=True)]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_shipped_weights_give_the_recorded_numbers(name: str) -> None:
    bundle = find_bundle(name)
    network, found = bundle.network(), []
    for image in [v["inputs"]["image"] for k, v in bundle.metadata.items() if k.endswith("_data_format")]:
        with torch.inference_mode():
            found += rows(network(wave(tuple(image["spatial_shape"]), image["num_channels"]))[0])
    assert found == [pytest.approx(row, abs=2e-3) for row in EXPECTED[name]], found


def test_every_bundle_is_pinned() -> None:
    assert set(EXPECTED) == {path.parent.parent.name for path in BUNDLES.glob("*/configs/metadata.json")}
