"""A small objective, data with random transforms, and a script that trains, to be killed or run side by side.

``python training_synthetic.py OUTPUT_DIR '{"steps": 8}' ...``; the JSON holds arguments of :func:`make`, with
``"task"`` those of :func:`objectives_synthetic.make`, with ``"adapt"`` those of :func:`make_adapted`. With
``KILL_AT=n`` the process kills itself during update n.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medvit import create_model
from medvit.adapt.adapted import LoraFile, adapted
from medvit.pretrain.objective import Losses
from medvit.pretrain.processes import World
from medvit.pretrain.schedule import Cosine
from medvit.pretrain.supervised import Supervised
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

    def forward(self, batch, progress):
        x = batch["image"]
        target = self.teacher.embed(x) + x.mean((1, 2, 3))[:, None]
        made = self.encoder.embed(x + self.noise * torch.randn_like(x)) if self.noise else self.encoder.embed(x)
        loss = (made - target).square().mean() * (1 + progress)
        return Losses(loss, {"raw": loss.detach()})

    def after_step(self, progress):
        self.updates += 1
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


class Told:
    """Images whose brightness tells the class, of patients with two images each."""

    def __init__(self, count, labels, seed=0):
        noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.labels = labels(torch.arange(count))
        told = self.labels if self.labels.dim() == 1 else self.labels @ torch.tensor([1, 2])
        self.images = noise + 0.3 * told[:, None, None, None]
        self.cases = [{"case": f"c{i}", "group": f"p{i // 2}"} for i in range(count)]

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return {"image": self.images[indices], "label": self.labels[indices]}


def make_adapted(output_dir, *, adapt: str, **settings) -> Trainer:
    """Fine-tuning of a small vision transformer, or what ``adapt`` leaves of it."""
    torch.manual_seed(3)
    size = {"in_channels": 1, "img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    network = adapted(create_model("vit", num_classes=2, **size), adapt, rank=2)
    arguments = {
        "batch_size": 8,
        "steps": 4,
        "learning_rate": 1e-2,
        "eps": 1e-4,
        "save_every": 2,
        "log_every": 1,
        "device": "cpu",
        "seed": 11,
        "watchers": [LoraFile(Path(output_dir) / "lora.safetensors")],
    } | settings
    data = Told(16, lambda numbers: numbers % 2)
    return Trainer(Supervised(network, nn.CrossEntropyLoss()), data, output_dir=output_dir, **arguments)


# --- runs in processes of their own


def start(*runs, **environment) -> subprocess.Popen:
    """Train in a process: folders and settings in turn."""
    words = [json.dumps(word) if isinstance(word, dict) else str(word) for word in runs]
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment
    return subprocess.Popen([sys.executable, __file__, *words], env=variables, stderr=subprocess.PIPE)


def train_killed(folder, settings, at: int) -> None:
    """Train in a process that dies of SIGKILL during update ``at``."""
    process = start(folder, settings, KILL_AT=str(at))
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said.decode()[-3000:]


def train_in_two(*runs) -> None:
    """Train in two processes side by side, over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(*runs, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    try:
        said = [process.communicate(timeout=600)[1].decode()[-3000:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said


# --- what they leave


def state(folder, step: int = 12) -> dict:
    return torch.load(folder / f"checkpoints/step-{step:09d}.pt", weights_only=True)


def lines(folder) -> list[dict]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "memory_mb")} for line in found]


def assert_same(one, other, tolerance: float = 0.0) -> None:
    """Equal nested dictionaries and lists, floating point tensors up to a tolerance."""
    a, b = flat(one), flat(other)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(
                b[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
            )
        else:
            assert value == b[key], key


def flat(value, name: str = "") -> dict:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{name}/{i}").items()}
    return {name: value}


def _kill_itself(objective: nn.Module, at: int) -> None:
    done, after_step = 0, objective.after_step

    def fatal(progress):
        nonlocal done
        done += 1
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        after_step(progress)

    objective.after_step = fatal


if __name__ == "__main__":
    import objectives_synthetic

    torch.set_num_threads(1)
    with World("cpu").open():  # one group of processes for all runs
        for folder, words in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            settings = json.loads(words)
            makers = {"task": objectives_synthetic.make, "adapt": make_adapted}
            trainer = next((m for key, m in makers.items() if key in settings), make)(folder, **settings)
            if "KILL_AT" in os.environ:
                _kill_itself(trainer.objective, int(os.environ["KILL_AT"]))
            trainer.run()
