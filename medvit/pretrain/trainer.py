"""The training loop: any objective, on one process or many, that can be killed at any time and goes on exactly.

A run is a function of its settings and seed. Batches and random numbers follow from the step (see
:mod:`medvit.pretrain.stream`), rates from the progress, so that a state is what the network and the optimizer hold, and
the number of the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvit.errors import OutputError
from medvit.pretrain.checkpoint import Checkpoints, export, plain_state
from medvit.pretrain.optimizer import adamw, parameter_groups, set_rates
from medvit.pretrain.processes import World, accumulating, gathered, like, whole
from medvit.pretrain.record import Record, logger, memory_mb
from medvit.pretrain.schedule import Schedule, as_schedule, progress_of, sampled
from medvit.pretrain.stream import BATCH, Stream, seed_everything

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Watcher = Callable[[nn.Module], Mapping[str, float]]
Groups = Callable[[nn.Module], list[dict[str, Any]]]
Augment = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


class NotFinite(ArithmeticError):
    """Losses or gradients were not finite for too many steps in a row."""


class Trainer:
    """Trains an objective with AdamW and leaves its encoder in ``output_dir``.

    Written there: ``log.jsonl``, ``pictures/``, and with every state in ``checkpoints/`` the encoder as it then is,
    ``encoder.safetensors`` with ``encoder.safetensors.json``.

    Args:
        objective: see :class:`medvit.pretrain.objective.Objective`; ``forward(batch, progress)`` returns a loss and its
            parts, ``after_step(progress)`` follows each update, ``encoder`` is exported, or, if there is
            ``exports``, the modules that it names. The method ``pictures(batch) -> {name: (rows, columns[, 3]) in
            [0, 1]}``, if there is one, is asked for what to save.
        data: a data set, or several that take turns, see :class:`~medvit.pretrain.stream.Stream`.
        output_dir: of the run.
        steps: optimizer steps; or, instead, ``epochs`` over the first data set.
        batch_size: images per step, over all processes and accumulated batches: results do not depend on how many
            processes share the work.
        accumulate: batches that a step is made of.
        learning_rate, weight_decay: numbers or schedules, see :mod:`medvit.pretrain.schedule`.
        betas, eps: of AdamW.
        groups: objective to parameter groups, for layer-wise rates; None:
            :func:`~medvit.pretrain.optimizer.parameter_groups`, which says what groups hold.
        clip: greatest norm of the gradient; None: any.
        precision: of autocast: ``"float32"`` (none), ``"bfloat16"``, or ``"float16"`` with a gradient scaler.
        parallel: how several processes share the network, ``"ddp"`` or ``"fsdp"`` (FSDP2).
        recompute: recompute the encoder's blocks in the backward pass instead of keeping their activations.
        augment: run on each batch on the device; may draw from torch's global generator.
        num_workers: processes that load ahead.
        seed: of order, transforms and masks. Initial weights are the caller's.
        device: ``"auto"`` or a name.
        save_every: steps between states; the last step is always saved.
        keep: newest states that stay.
        resume: go on from the newest state in ``output_dir``; False: overwrite what is there.
        log_every: steps between lines, which hold means since the last line.
        watchers: called with the objective every ``watch_every`` steps and after the last one, in evaluation mode and
            without gradients; what they return is logged. Pictures are saved at the same steps.
        watch_every: 0: after the last step only.
        patience: consecutive steps with a loss or gradient that is not finite; each is skipped, after so many the run
            stops, saved.
        description: JSON values for the exported encoder's note, such as ``network_def``.

    Raises:
        ValueError: settings that do not fit.
        TypeError: a description that JSON cannot hold.
    """

    def __init__(
        self,
        objective: nn.Module,
        data: Any,
        *,
        output_dir: str | Path,
        batch_size: int,
        steps: int | None = None,
        epochs: float | None = None,
        accumulate: int = 1,
        learning_rate: float | Schedule = 1e-3,
        weight_decay: float | Schedule = 0.05,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        groups: Groups | None = None,
        clip: float | None = None,
        precision: str = "float32",
        parallel: str = "ddp",
        recompute: bool = False,
        augment: Augment | None = None,
        num_workers: int = 0,
        seed: int = 0,
        device: str | torch.device = "auto",
        save_every: int = 1000,
        keep: int = 2,
        resume: bool = True,
        log_every: int = 50,
        watchers: Sequence[Watcher] = (),
        watch_every: int = 0,
        patience: int = 10,
        description: Mapping[str, Any] | None = None,
    ):
        self.world = World(device)
        _check(precision, parallel, batch_size, accumulate, self.world.size)
        _check_intervals(save_every=save_every, log_every=log_every, patience=patience)
        json.dumps(description)  # now, not at the first state
        sources = list(data) if isinstance(data, list | tuple) else [data]
        self.stream = Stream(
            sources,
            batch_size // accumulate,
            seed=seed,
            rank=self.world.rank,
            world=self.world.size,
            num_workers=num_workers,
        )
        self.steps = _steps(steps, epochs, self.stream, accumulate)
        self.objective, self.output_dir = objective, Path(output_dir)
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.learning_rate, self.weight_decay = as_schedule(learning_rate), as_schedule(weight_decay)
        self.betas, self.eps, self.groups, self.clip = tuple(betas), eps, groups or parameter_groups, clip
        self.precision, self.parallel, self.recompute = PRECISIONS[precision], parallel, recompute
        self.augment, self.resume, self.patience = augment, resume, patience
        self.save_every, self.log_every, self.watch_every = save_every, log_every, watch_every
        self.watchers, self.description = tuple(watchers), dict(description or {})
        settings: dict[str, Any] = {
            "seed": seed,
            "steps": self.steps,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "precision": precision,
            "learning_rate": sampled(self.learning_rate),
            "weight_decay": sampled(self.weight_decay),
            "betas": list(self.betas),
            "eps": eps,
            "clip": clip,
            "trained_parameters": sum(p.numel() for p in objective.parameters() if p.requires_grad),
            "items": [len(source) for source in sources],
        }
        self.checkpoints = Checkpoints(self.output_dir / "checkpoints", keep, settings)

    def run(self) -> dict[str, float]:
        """Train to the end, from the newest state if there is one.

        Returns:
            What the last line of the log says; nothing where the run was at its end already.

        Raises:
            NotFinite: see ``patience``.
            OutputError: the folder holds a run with other settings.
        """
        with self.world.open():
            return _Run(self).go()


class _Run:
    """One call of :meth:`Trainer.run`: what lives only while it goes on."""

    def __init__(self, trainer: Trainer):
        self.t, self.world = trainer, trainer.world
        self.objective = trainer.objective.to(self.world.device)
        objective: Any = self.objective
        self.exports: Mapping[str, nn.Module] = getattr(objective, "exports", {"encoder": objective.encoder})
        if trainer.recompute:
            _recompute(objective)
        if self.world.device.type == "cpu" and trainer.precision != torch.float32:
            _unfuse_attention(objective)
        self.shared = self.world.share(self.objective, trainer.parallel)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = adamw(trainer.groups(self.objective), trainer.betas, trainer.eps)
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=trainer.precision == torch.float16)
        self.record = Record(trainer.output_dir, trainer.steps, self.world.rank == 0)
        self.step, self.bad, self.skipped, self.norm = 0, 0, 0, math.nan
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.recent: dict[tuple[str, ...], dict[str, Tensor]] = {}  # the last batch of each kind, for pictures

    def go(self) -> dict[str, float]:
        """See :meth:`Trainer.run`."""
        t = self.t
        state = t.checkpoints.latest() if t.resume else None
        self.world.require_same(-1 if state is None else state["step"], f"the newest state in {t.checkpoints.folder}")
        if state is not None:
            self.restore(state)
        elif self.world.rank == 0:
            t.checkpoints.clear()
        self.objective.train()
        logged = self.world.from_first(self.record.open(self.step))
        last: dict[str, float] = {}
        if self.step > logged:  # what came after the state, such as the watchers' tables, is missing
            last = self.tell() or last
        pin = self.world.device.type == "cuda"
        batches = t.stream.batches(self.step * t.accumulate, t.steps * t.accumulate, pin_memory=pin)
        try:
            while self.step < t.steps:
                self.update(batches)
                last = self.after_update() or last
        finally:
            self.record.close()
        return last

    def update(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step."""
        t, progress = self.t, progress_of(self.step, self.t.steps)
        set_rates(self.optimizer, t.learning_rate, t.weight_decay, progress)
        values: list[dict[str, Tensor]] = []
        before = [(buffer, buffer.clone()) for buffer in self.objective.buffers()]
        for part, loaded in enumerate(islice(batches, t.accumulate)):
            batch = {key: value.to(self.world.device, non_blocking=True) for key, value in loaded.items()}
            number = self.step * t.accumulate + part
            seed_everything(t.seed, BATCH, number, self.world.rank)
            if t.augment is not None:
                batch = dict(t.augment(batch))
            self.recent[tuple(sorted(batch))] = batch
            values.append(self.backward(batch, progress, last=part == t.accumulate - 1))
        means = {
            key: torch.stack([v[key] for v in values if key in v]).mean() for key in {k for v in values for k in v}
        }
        if not self.apply(means, progress):
            with torch.no_grad():  # statistics and centres have seen what was not finite
                for buffer, kept in before:
                    buffer.copy_(kept)
        if self.bad >= t.patience:
            self.give_up(float(means["loss"]))
        self.step += 1
        self.record.advance(t.batch_size)

    def backward(self, batch: dict[str, Tensor], progress: float, *, last: bool) -> dict[str, Tensor]:
        """Add the gradient of one batch; its losses, float32 and detached."""
        t, device = self.t, self.world.device.type
        with accumulating(self.shared, last):
            with torch.autocast(device, t.precision, enabled=t.precision != torch.float32):
                losses = self.shared(batch, progress)
            self.scaler.scale(losses.loss / t.accumulate).backward()
        named = {"loss": losses.loss, **losses.parts}
        return {key: value.detach().float().mean() for key, value in named.items()}

    def apply(self, means: dict[str, Tensor], progress: float) -> bool:
        """Update the weights, unless loss or gradient are not finite; whether it did."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.t.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.t.clip, norm)
        norm = _full(norm).float()
        names = sorted(means)
        averaged = self.world.mean(torch.stack([means[name].to(norm.device) for name in names]))
        means = dict(zip(names, averaged.unbind(), strict=True))
        healthy = bool(means["loss"].isfinite()) and bool(norm.isfinite())
        if healthy:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            after: Any = self.objective.after_step
            after(progress)
            self.bad = 0
            self.count({**means, "grad_norm": norm})
        else:
            self.skipped += 1
            # an overflow with a scaler is business as usual, until its factor has nothing left to give
            if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
                self.bad += 1
            self.scaler.update(self.scaler.get_scale() / 2) if self.scaler.is_enabled() else None
        self.optimizer.zero_grad(set_to_none=True)
        self.norm = float(norm)
        return healthy

    def give_up(self, loss: float) -> None:
        """Save what there is and raise."""
        self.bad = 0  # or the saved state would stop again at once
        self.step += 1
        self.save()
        raise NotFinite(
            f"step {self.step}: the loss or the gradient was not finite for {self.t.patience} steps in a row "
            f"(loss {loss}, norm {self.norm}); the state before them is saved in {self.t.checkpoints.folder}. Lower "
            "the learning rate, set clip=1.0, use precision='bfloat16' instead of 'float16'; check the images for NaN"
        )

    def count(self, values: Mapping[str, Tensor]) -> None:
        """Add to the means of the next line."""
        for key, value in values.items():
            total, count = self.sums.get(key, (torch.zeros_like(value), 0))
            self.sums[key] = total + value, count + 1

    def after_update(self) -> dict[str, float] | None:
        """Save, watch and log, where it is time to; what the log says, if it does."""
        saved = self.step == self.t.steps or self.step % self.t.save_every == 0
        if saved:  # first: a watcher may fail, and the next run of the command then calls it again
            self.save()
        return self.tell() if saved or self.watches() or self.step % self.t.log_every == 0 else None

    def watches(self) -> bool:
        """Whether it is time to."""
        return self.step == self.t.steps or (self.t.watch_every > 0 and self.step % self.t.watch_every == 0)

    def tell(self) -> dict[str, float]:
        """Watch, where it is time to, and log."""
        line = self.line()
        if self.watches():
            line |= self.watch()
        self.record.write(self.step, line)
        return line

    def line(self) -> dict[str, float]:
        """Means since the last line, rates, speed."""
        t, progress = self.t, progress_of(self.step - 1, self.t.steps)
        means = {key: float(total) / count for key, (total, count) in sorted(self.sums.items())}
        self.sums = {}
        return {
            **means,
            "lr": t.learning_rate(progress),
            "weight_decay": t.weight_decay(progress),
            "epoch": t.stream.epochs_in(self.step * t.accumulate),
            "images_per_second": self.record.speed(),
            "memory_mb": memory_mb(self.world.device),
            **({"skipped": self.skipped} if self.skipped else {}),
        }

    def watch(self) -> dict[str, float]:
        """Ask the watchers, and save pictures; every process does, since a sharded network needs them all."""
        seen: dict[str, float] = {}
        self.objective.eval()
        with torch.no_grad(), gathered(self.shared):
            for watcher in self.t.watchers:
                seen |= watcher(self.objective)
            draw = getattr(self.objective, "pictures", None)
            if draw is not None:
                for batch in self.recent.values():
                    self.record.pictures(self.step, draw(batch))
        self.objective.train()
        return seen

    def save(self) -> None:
        """Write a state and the encoder; every process must call."""
        state = whole(
            {
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "bad": self.bad,
                "skipped": self.skipped,
            }
        )
        exports = {name: whole(plain_state(module)) for name, module in self.exports.items()}
        if self.world.rank == 0:
            note = {**self.t.description, **self.t.checkpoints.settings, "step": self.step}
            for name, weights in exports.items():
                export(weights, self.t.output_dir / f"{name}.safetensors", note)
            self.t.checkpoints.save(self.step, state)  # last: a run killed before goes on from an earlier one
        if self.world.size > 1:
            dist.barrier()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        own = self.objective.state_dict()
        if own.keys() != state["objective"].keys():
            differ = sorted(own.keys() ^ state["objective"].keys())
            raise OutputError(
                f"{self.t.checkpoints.folder}: of a run of another objective or network, whose state has other tensors "
                f"({', '.join(differ[:3])}); take another output_dir, or resume=False"
            )
        self.objective.load_state_dict({key: like(value, own[key]) for key, value in state["objective"].items()})
        optimizer = state["optimizer"]
        flat = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, slots in optimizer["state"].items():
            optimizer["state"][number] = {key: like(value, flat[number]) for key, value in slots.items()}
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.bad, self.skipped = state["step"], state["bad"], state["skipped"]
        logger.info("going on from step %d of %d", self.step, self.t.steps)


def _check(precision: str, parallel: str, batch_size: int, accumulate: int, world: int) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {sorted(PRECISIONS)}, got {precision!r}")
    if precision == "float16" and parallel == "fsdp":
        raise ValueError("a sharded network cannot be trained in float16 here, whose scaler it lacks; use bfloat16")
    if accumulate < 1 or batch_size < 1 or batch_size % (accumulate * world):
        share = accumulate * world
        raise ValueError(
            f"batch_size must be a multiple of accumulate x processes = {accumulate} x {world}, got {batch_size}; "
            f"use {max(round(batch_size / max(share, 1)), 1) * share}"
        )


def _check_intervals(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}; to save or log at the end only give many")


def _steps(steps: int | None, epochs: float | None, stream: Stream, accumulate: int) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError(f"give either steps or epochs, got steps={steps} and epochs={epochs}")
    count = steps if epochs is None else math.ceil(stream.batches_in(epochs) / accumulate)
    if count is None or count < 1:
        raise ValueError(f"a run needs at least one step, got steps={steps}, epochs={epochs}")
    return count


def _unfuse_attention(objective: Any) -> None:
    """Attention of timm's blocks by matrix products: a CPU's fused kernel is slow backward in half precision."""
    for module in objective.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def _recompute(objective: Any) -> None:
    """Make the blocks in the module lists of the encoder that is trained keep no activations; names of weights stay.

    Of an objective with a teacher that is not ``encoder``, which has no gradients, but the student's.
    """
    alike = [module for module in objective.modules() if type(module) is type(objective.encoder)]
    trained = [encoder for encoder in alike if any(p.requires_grad for p in encoder.parameters())]
    for blocks in [m for encoder in trained for m in encoder.modules() if isinstance(m, nn.ModuleList)]:
        for block in blocks:
            forward = block.forward
            block.forward = partial(_checkpointed, forward)


def _checkpointed(forward: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


def _full(norm: Tensor) -> Tensor:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
