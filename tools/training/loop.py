"""`matchanything train CONFIG`: the training loop.

Every step's randomness follows from (seed, step, rank), so that a run that was stopped and one that was not see the
same batches. Starts as one process, or as several under torchrun (one per GPU, gradients averaged).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import load_strict, read_checkpoint
from matchanything_tools.networks.kestrel.model import CELL, Kestrel, cell_centres
from matchanything_tools.training import losses
from matchanything_tools.training.checkpoint import load_checkpoint, save_checkpoint, save_weights
from matchanything_tools.training.config import Config, Phase, read_config
from matchanything_tools.training.curves import add_to_curves, draw_curves, forget_curves
from matchanything_tools.training.data import Photographs, load_photographs, make_batch


class Trainer:
    """Everything a run consists of; `advance` does one step."""

    def __init__(self, config: Config, photos: Photographs, device: torch.device, rank: int = 0, world: int = 1):
        self.config, self.photos, self.device, self.rank, self.world = config, photos, device, rank, world
        torch.manual_seed(config.seed)
        self.network = Kestrel().to(device)
        self.average = Kestrel().to(device)
        self.average.load_state_dict(self.network.state_dict())
        if device.type == "cuda":
            self.network = self.network.to(memory_format=torch.channels_last)
            self.average = self.average.to(memory_format=torch.channels_last)
        matrices = [p for p in self.network.parameters() if p.ndim > 1]
        vectors = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
        self.step = 0

        def compiled(function: Any) -> Any:  # a graph per shape: dynamic ones took minutes to compile
            return torch.compile(function, dynamic=False) if config.compile else function

        self.forward = compiled(self.network)
        self.coarse = compiled(losses.cell_loss)
        self.fine = compiled(losses.fine_losses)
        self._mine = [t for t in self.network.state_dict().values() if t.is_floating_point()]
        self._theirs = [t for t in self.average.state_dict().values() if t.is_floating_point()]

    def phase(self) -> Phase:
        done = self.step / self.config.steps
        return next((phase for phase in self.config.phases if done < phase.until), self.config.phases[-1])

    def advance(self, measure: bool = False) -> dict[str, Tensor]:
        """One step; returns losses and figures as tensors (nothing waits for the device). measure: precision too."""
        config, phase = self.config, self.phase()
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 64 + self.rank)
        progress = self.step / config.steps
        shape = (phase.height, phase.width)
        hardest = min(1.0, config.hardest_start + (1 - config.hardest_start) * progress / config.hardest_full)
        batch = make_batch(self.photos, phase.batch, shape, config.easiest, hardest)
        rope_scale = 1.0 if torch.rand(()) < 0.5 else 1.0 + torch.rand(()).item()
        centres = cell_centres(shape[0] // CELL, shape[1] // CELL, self.device)
        sample = losses.sample_fine(batch, config.fine_matches, shape, centres)
        rate = config.learning_rate * min(1.0, (self.step + 1) / config.warmup_steps)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        scale = torch.tensor(rope_scale, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = self.forward(batch.images, scale)
        logits = losses.logits_of(features)
        parts = {
            "cells": self.coarse(logits, batch.forward, batch.backward),
            "matchable": losses.matchable_loss(features.matchable, batch),
        }
        fine = self.fine(self.network.window, self.network.patch, features, sample)
        parts |= dict(zip(("window_ce", "window_nll", "patch_ce", "patch_nll"), fine[:4], strict=True))
        loss = torch.stack([value * config.weights.get(name, 1.0) for name, value in parts.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0, foreach=True)
        # the fused optimizer leaves a step out when this says so; asking on the host would wait for the device
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.step += 1
        self._follow()
        figures = {"loss": loss.detach(), **{k: v.detach() for k, v in parts.items()}, **fine[4], "gradient": norm}
        if measure:
            figures |= losses.match_quality(logits.detach(), features.matchable.detach(), batch, centres)
        return figures

    def _average_gradients(self) -> None:
        if self.world == 1:
            return
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [piece.view(gradient.shape) for piece, gradient in zip(pieces, gradients, strict=True)]
        )

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the exponential moving average of weights and batch norm statistics."""
        decay = min(self.config.ema, 1 - 1 / (self.step / 4 + 1))
        torch._foreach_lerp_(self._theirs, self._mine, 1 - decay)

    def state(self) -> dict[str, Any]:
        """All that resuming needs."""
        return {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where `state` was."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


@contextlib.contextmanager
def processes() -> Iterator[tuple[torch.device, int, int]]:
    """(device, rank, number of processes), as torchrun says; alone without it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, rank, world
    finally:
        if world > 1:
            dist.destroy_process_group()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything train`."""
    parser.add_argument("config", type=Path, help="YAML file, such as config/train/kestrel.yaml")
    parser.add_argument("--images", type=Path, required=True, help="folder with train.json and train/*.jpg")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights and curves")
    parser.add_argument("--init", type=Path, help="weights of an earlier run to start from (kestrel-STEP.pt)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of CONFIG")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="write a checkpoint there and stop")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="likewise, by the clock")


def run(args: argparse.Namespace) -> int:
    """Train, or go on where the checkpoint in --out stopped."""
    started = time.monotonic()
    config = read_config(args.config, args.set)
    with processes() as (device, rank, world):
        photos = load_photographs(args.images, device)
        trainer = Trainer(config, photos, device, rank, world)
        state = load_checkpoint(args.out)
        if state is not None:
            try:
                trainer.restore(state)
            except (KeyError, RuntimeError, ValueError) as error:
                raise UserError(f"The checkpoint in {args.out} is of another network: choose another --out.") from error
        elif args.init is not None:
            weights = read_checkpoint(args.init)
            for network in (trainer.network, trainer.average):
                load_strict(network, weights, what="Kestrel", path=args.init)
        if rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            forget_curves(args.out / "curves.csv", trainer.step)
            count = sum(p.numel() for p in trainer.network.parameters()) / 1e6
            print(
                f"{len(photos.sizes)} photographs, {count:.2f} M parameters, {world} x {device}, "
                f"step {trainer.step} of {config.steps}, {time.monotonic() - started:.0f} s to load",
                flush=True,
            )
        train(trainer, args.out, args.stop_at or config.steps, started + (args.stop_after or math.inf))
    return 0


def train(trainer: Trainer, out: Path, stop_at: int, deadline: float) -> None:
    """Steps until stop_at, config.steps or the deadline (time.monotonic); curves, checkpoints, weights into `out`."""
    config, since, first = trainer.config, time.monotonic(), trainer.step
    sums: dict[str, Tensor] = {}
    last = min(stop_at, config.steps)
    stop = torch.zeros(1, device=trainer.device)
    while trainer.step < last:
        log = (trainer.step + 1) % config.log_every == 0
        figures = trainer.advance(measure=log)
        for name, value in figures.items():
            sums[name] = sums.get(name, torch.zeros_like(value, dtype=torch.float32)) + value
        if log:
            now = time.monotonic()
            steps = min(config.log_every, trainer.step - first)
            row = {"step": trainer.step, "seconds": now - since, "pairs_per_s": 0.0}
            row["pairs_per_s"] = steps * trainer.phase().batch * trainer.world / (now - since)
            single = ("precision", "recall", "strangers")
            row |= {name: value.item() / (1 if name in single else steps) for name, value in sums.items()}
            sums, since, first = {}, time.monotonic(), trainer.step
            if trainer.rank == 0:
                add_to_curves(out / "curves.csv", row)
                shown = " ".join(
                    f"{name} {value:.3g}" for name, value in row.items() if name not in ("step", "seconds")
                )
                print(f"step {trainer.step}/{config.steps} {shown}", flush=True)
            stop.fill_(float(time.monotonic() > deadline))  # rank 0 decides for all
            if trainer.world > 1:
                dist.broadcast(stop, 0)
            if stop.item():
                break
        if trainer.rank == 0 and trainer.step % config.checkpoint_every == 0:
            save_checkpoint(out, trainer.state())
            save_weights(out / f"kestrel-{trainer.step:06d}.pt", trainer.average)
    if trainer.rank == 0:
        save_checkpoint(out, trainer.state())
        save_weights(out / f"kestrel-{trainer.step:06d}.pt", trainer.average)
        draw_curves(out / "curves.csv", out / "curves.png")
        print(f"stopped at step {trainer.step} of {config.steps}", flush=True)
