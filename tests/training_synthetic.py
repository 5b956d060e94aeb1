"""A small objective, data with random transforms, and a script that trains them, to be killed or run side by side.

``python training_synthetic.py OUTPUT_DIR '{"steps": 8}'``; the JSON holds arguments of Trainer. With ``TOY_KILL=n`` the
process kills itself during update n.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys

import numpy as np
import torch
from torch import nn

from medvit.pretrain.objective import Losses
from medvit.pretrain.schedule import Cosine
from medvit.pretrain.trainer import Trainer


class Encoder(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.spatial_dims, self.in_channels, self.channels, self.strides = 2, 1, (width,), ((4, 4),)
        self.embed_dim = width
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 1), nn.Tanh()) for _ in range(2))
        self.unused = nn.Linear(3, 3)  # as a 3D patch embedding is in a 2D batch

    def forward(self, x):
        x = self.patch(x) + self.cls_token
        for block in self.blocks:
            x = x + block(x)
        return [x]

    def embed(self, x):
        return self(x)[0].mean((2, 3))


class Toy(nn.Module):
    """Has all that a state may hold: a teacher, a buffer that moves, randomness."""

    def __init__(self, noise: float = 0.1):
        super().__init__()
        self.encoder, self.noise = Encoder(), noise
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.kill_at = int(os.environ.get("TOY_KILL", "-1"))

    def forward(self, batch, progress):
        x = batch["image"]
        target = self.teacher.embed(x) + x.mean((1, 2, 3))[:, None]
        made = self.encoder.embed(x + self.noise * torch.randn_like(x)) if self.noise else self.encoder.embed(x)
        loss = (made - target).square().mean() * (1 + progress)
        return Losses(loss, {"raw": loss.detach()})

    def after_step(self, progress):
        self.updates += 1
        if self.updates == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                slow.lerp_(fast, 0.05)


class Noisy:
    """Items made of three kinds of random numbers, as third-party transforms draw them."""

    def __init__(self, count: int = 22, noise: float = 0.1):
        self.noise = noise
        self.images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        drawn = torch.rand(1) + np.random.rand() + random.random()  # noqa: NPY002  # what is tested
        return {"image": self.images[index] + self.noise * drawn, "name": f"item {index}"}


def make(output_dir, *, noise: float = 0.1, device: str = "cpu", **settings) -> Trainer:
    torch.manual_seed(3)
    arguments = {
        "batch_size": 8,
        "steps": 12,
        "learning_rate": Cosine(3e-2, warmup=0.2),
        "save_every": 4,
        "log_every": 3,
        "device": device,
        "seed": 11,
    } | settings
    return Trainer(Toy(noise), Noisy(noise=noise), output_dir=output_dir, **arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder, settings in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        make(folder, **json.loads(settings)).run()
