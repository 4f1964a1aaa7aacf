"""The training loop's bookkeeping: learning rates, the averaged weights, and which weights are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from matchanything_tools.training.config import Config, Phase
from matchanything_tools.training.data import Photographs
from matchanything_tools.training.loop import Trainer, train

CONFIG = Config(steps=1000, phases=[Phase(1.0, 64, 64, 1)], fine_matches=8, learning_rate=1e-3, warmup_steps=4,
                ema=0.9, log_every=100, checkpoint_every=2, compile=False)  # fmt: skip


def test_the_learning_rate_warms_up_and_then_falls(photos: Photographs) -> None:
    trainer, rates = Trainer(CONFIG, photos, torch.device("cpu")), []
    for step in (0, 1, 3, 4, 500, 999):
        trainer.step = step
        trainer.advance()
        rates += {group["lr"] for group in trainer.optimizer.param_groups}
    # linear over four steps; a cosine from there to a hundredth, of which four steps of a thousand are nothing
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3, 0.505e-3, 0.01e-3], rel=1e-3)


@pytest.mark.parametrize(("step", "decay"), [(0, 1 - 1 / 1.25), (40, 0.9)], ids=["at first", "later"])
def test_the_average_follows_slowly(photos: Photographs, step: int, decay: float) -> None:
    """By `ema`, and faster while there is little to average: by 1 - 1 / (1 + step / 4)."""
    trainer = Trainer(CONFIG, photos, torch.device("cpu"))
    before = {name: value.clone() + 1 for name, value in trainer.average.state_dict().items()}
    trainer.average.load_state_dict(before)
    trainer.step = step
    trainer.advance()
    network = trainer.network.state_dict()
    for name, value in trainer.average.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, decay * before[name] + (1 - decay) * network[name], atol=1e-5), name


def test_the_average_is_what_is_written(photos: Photographs, tmp_path: Path) -> None:
    """At each checkpoint and at the end. Nothing is learnt here: weights count the steps."""
    trainer = Trainer(CONFIG, photos, torch.device("cpu"))

    def advance(measure: bool = False) -> dict[str, Tensor]:
        trainer.step += 1
        for network, value in ((trainer.network, -1), (trainer.average, trainer.step)):
            torch.nn.utils.vector_to_parameters(
                torch.full((sum(p.numel() for p in network.parameters()),), float(value)), network.parameters()
            )
        return {}

    trainer.advance = advance  # type: ignore[method-assign]
    train(trainer, tmp_path, stop_at=3, deadline=float("inf"))
    for step in (2, 3):
        weights = torch.load(tmp_path / f"kestrel-{step:06d}.pt", weights_only=True)
        assert all((weights[name] == step).all() for name, _ in trainer.average.named_parameters())
