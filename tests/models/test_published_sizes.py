"""The published networks at their published input sizes: they run in the memory of a laptop, and are finite."""

import pytest
import torch

from medvit import create_model
from medvit.models.heads import as_encoder

# name: (constructor arguments, image without its batch, shape of what comes out)
PUBLISHED = {
    "swin_unetr": ({"in_channels": 1, "out_channels": 14, "feature_size": 48}, (1, 96, 96, 96), (14, 96, 96, 96)),
    "d_former": ({"in_channels": 1, "out_channels": 14}, (1, 64, 128, 128), (14, 64, 128, 128)),
    "hbformer": ({"img_size": 256}, (3, 256, 256), (9, 256, 256)),
    "uni4eye-2d": ({}, (3, 224, 224), (1024, 14, 14)),
    "uni4eye-3d": ({}, (3, 224, 224, 112), (1024, 14, 14, 7)),
    "rad_dino": ({}, (3, 518, 518), (768, 37, 37)),
    "mae": ({"img_size": 224}, (3, 224, 224), (768, 14, 14)),
    "vit": ({"num_classes": 14, "img_size": 224}, (3, 224, 224), (14,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PUBLISHED)
def test_a_published_network_runs_at_its_published_size(case):
    arguments, size, shape = PUBLISHED[case]
    torch.manual_seed(0)
    model = create_model(case.split("-")[0], **arguments).eval()
    model = as_encoder(model) if case in ("mae", "uni4eye-2d", "uni4eye-3d") else model
    with torch.inference_mode():
        out = model(torch.randn(1, *size))
    out = out[0] if isinstance(out, list) else out
    assert out.shape == (1, *shape)
    assert torch.isfinite(out).all()
    assert out.std() > 0
