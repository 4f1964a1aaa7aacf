"""Training: the truth that it teaches is the truth, the loss falls, and stopping changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from matchanything_ros.errors import UserError
from matchanything_tools.networks.kestrel.model import cell_centres
from matchanything_tools.networks.kestrel.refine import PatchRefiner, steps
from matchanything_tools.training.checkpoint import load_checkpoint, save_checkpoint
from matchanything_tools.training.config import Config, Phase, read_config
from matchanything_tools.training.curves import forget_curves
from matchanything_tools.training.data import Photographs, make_batch
from matchanything_tools.training.geometry import between, cell_targets, jacobian, random_views, warp
from matchanything_tools.training.loop import Trainer, train
from matchanything_tools.training.losses import sample_fine
from matchanything_tools.training.sensors import sense

TINY = Config(steps=6, phases=[Phase(0.5, 64, 64, 2), Phase(1.0, 64, 96, 2)], fine_matches=16, log_every=2,
              checkpoint_every=3, compile=False, seed=3)  # fmt: skip


def test_a_known_homography_gives_the_known_cells() -> None:
    shift = torch.tensor([[[1.0, 0.0, 19.0], [0.0, 1.0, -8.0], [0.0, 0.0, 1.0]]])  # cell (r, c) -> (r - 1, c + 19 / 8)
    everywhere = torch.ones(1, 8 * 10, dtype=torch.bool)
    targets = cell_targets(shift, everywhere, everywhere, (64, 80))
    # cell 3 of row 2 has its centre at (27.5, 19.5); it goes to (46.5, 11.5): column 5 (40..47), row 1
    assert targets.points[0, 23].tolist() == [46.5, 11.5]
    assert targets.cells[0, 23] == 1 * 10 + 5
    assert targets.valid[0, 23]
    assert not targets.valid[0, :10].any()  # row 0 leaves the view above
    assert not targets.valid[0, 18]  # column 8 goes to 67.5 + 19 = 86.5, right of the view


def test_views_are_related_by_the_homography_that_is_taught() -> None:
    torch.manual_seed(0)
    matrix0, matrix1, _, _ = random_views(torch.tensor([[400.0, 300.0]] * 16), (64, 96), torch.ones(16))
    points = torch.rand(16, 50, 2) * 60
    via_photograph, _ = warp(matrix0, points)
    mapped, front = warp(between(matrix0, matrix1), points)
    again, _ = warp(matrix1, mapped)
    assert ((again - via_photograph).abs().amax(-1)[front] < 0.05).float().mean() > 0.99


def test_jacobian_is_the_derivative() -> None:
    matrix = torch.tensor([[[1.1, 0.2, 5.0], [-0.1, 0.9, 3.0], [1e-3, -5e-4, 1.0]]], dtype=torch.float64)
    point = torch.tensor([[[30.0, 40.0]]], dtype=torch.float64)
    step = 1e-4
    columns = [(warp(matrix, point + step * e)[0] - warp(matrix, point - step * e)[0]) / (2 * step)
               for e in torch.eye(2, dtype=torch.float64)]  # fmt: skip
    assert torch.allclose(jacobian(matrix, point), torch.stack(columns, -1), atol=1e-6)


def test_fine_targets_lead_to_the_truth(photos: Photographs) -> None:
    torch.manual_seed(1)
    shape = (64, 96)
    batch = make_batch(photos, 8, shape, 0.2, 1.0)
    centres = cell_centres(8, 12)
    sample = sample_fine(batch, 20, shape, centres)
    assert sample.valid.float().mean() > 0.2
    truth, _ = warp(batch.homographies, sample.points0)
    by_window = centres[sample.partners] + sample.window_offset
    _, step1 = steps(sample.affine)
    by_patch = sample.start + torch.einsum("bmij,bmj->bmi", step1, sample.shift)
    assert ((by_window - truth).abs().amax(-1)[sample.valid] < 1e-2).all()
    assert ((by_patch - truth).abs().amax(-1)[sample.valid] < 1e-2).all()


def test_the_patch_stage_starts_as_a_correlation() -> None:
    """Untrained, it already finds the shift between a map and itself."""
    torch.manual_seed(0)
    stage = PatchRefiner(fine=8)
    noise = torch.nn.functional.avg_pool2d(torch.randn(1, 8, 64, 64), 3, 1, 1)
    with torch.no_grad():
        detail = stage.detail(noise)
        points = torch.full((1, 1, 2), 60.5)
        shift, _, _ = stage(detail, detail, points, points + torch.tensor([4.0, -2.0]), torch.eye(2).expand(1, 1, 2, 2))
    assert torch.allclose(shift[0, 0], torch.tensor([-2.0, 1.0]), atol=0.35)  # steps of 2 px


def test_sensors_keep_range_and_stay_natural_when_told() -> None:
    torch.manual_seed(0)
    rgb = torch.rand(6, 3, 64, 64)
    for difficulty, natural in ((1.0, False), (0.0, True)):
        out = sense(rgb, torch.full((6,), difficulty), torch.full((6,), natural))
        assert out.shape == (6, 1, 64, 64) and torch.isfinite(out).all()
        assert out.min() >= 0 and out.max() <= 1


def test_the_loss_falls_on_ten_images(photos: Photographs) -> None:
    config = Config(
        steps=1000,
        phases=[Phase(1.0, 64, 64, 2)],
        warmup_steps=5,
        compile=False,
        fine_matches=24,
        easiest=0.1,
        hardest_start=0.2,
        hardest_full=1.0,
    )
    trainer = Trainer(config, photos, torch.device("cpu"))
    history = [{name: value.item() for name, value in trainer.advance().items()} for _ in range(50)]
    for name, share in (("loss", 0.8), ("window_ce", 0.7), ("patch_ce", 0.8)):  # seeds 1 and 2: .47, .39, .60
        assert np.mean([row[name] for row in history[-15:]]) < share * np.mean([row[name] for row in history[:5]]), name


def test_resuming_equals_not_stopping(photos: Photographs, tmp_path: Path) -> None:
    def run(out: Path, *stops: int) -> dict[str, torch.Tensor]:
        out.mkdir()
        for stop in stops:
            trainer = Trainer(TINY, photos, torch.device("cpu"))
            state = load_checkpoint(out)
            if state is not None:
                trainer.restore(state)
            train(trainer, out, stop, float("inf"))
        return trainer.average.state_dict()

    whole, stopped = run(tmp_path / "whole", 6), run(tmp_path / "stopped", 4, 6)
    for name, value in whole.items():
        assert torch.allclose(value.float(), stopped[name].float(), rtol=1e-4, atol=1e-5), name
    assert (tmp_path / "stopped" / "curves.csv").read_text(encoding="utf-8").count("\n") == 4  # header, steps 2, 4, 6
    assert (tmp_path / "whole" / "kestrel-000006.pt").exists()


def test_checkpoints_are_whole_or_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 1, "value": torch.rand(5_000_000)})
    folder = save_checkpoint(tmp_path, {"step": 2, "value": torch.rand(5_000_000)})
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]  # the old one is gone, nothing temporary left
    parts = sorted(folder.iterdir())
    assert len(parts) == 2 and all(part.stat().st_size <= 16 << 20 for part in parts)
    whole = parts[1].read_bytes()
    for content in (whole[:1000], b"", bytes(len(whole))):  # cut off, empty, of the right size without content
        parts[1].write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint(tmp_path)
    parts[0].unlink()
    with pytest.raises(UserError, match="lacks parts"):
        load_checkpoint(tmp_path)


def test_a_config_with_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "steps: 10\nphases: [{until: 1.0, height: 64, width: 64, batch: 2}]\nlearning_rat: 1\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="learning_rat"):
        read_config(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no keys"),
        ("steps: [", "cannot be read as YAML"),
        ("steps: ten\nphases: []", "steps is 'ten'"),
        ("steps: 0\nphases: []", "steps is 0: give at least 1"),
        ("steps: 1\nphases: [{until: 1.0, height: 64}]", "phases is no list of"),
        ("steps: 1\nphases: []\nlog_every: 0", "log_every is 0"),
    ],
)
def test_broken_configs_are_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=sentence) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("steps: 1\nphases: [{until: 1.0, height: 64, width: 64, batch: 2}]\nlearning_rate: 1e-4")
    assert read_config(path).learning_rate == 1e-4 and read_config(path, ["ema=1e-1"]).ema == 0.1
    with pytest.raises(UserError, match="sets nothing"):
        read_config(path, ["ema"])


def test_curves_of_steps_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    """A run killed at step 8 that resumes from its checkpoint of step 4 writes the rows of 6 and 8 once more."""
    table = tmp_path / "curves.csv"
    table.write_text("step,loss\n2,9\n4,8\n6,7\n8,", encoding="utf-8")  # killed while it wrote a row
    forget_curves(table, 4)
    assert table.read_text(encoding="utf-8") == "step,loss\n2,9\n4,8\n"
    forget_curves(tmp_path / "nowhere.csv", 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.csv"]


def test_what_is_in_front_stays_in_front() -> None:
    """Also where pixel (0, 0) of one view lies behind the horizon of the other, as in one of 250 hard pairs."""
    torch.manual_seed(0)
    count = 5000
    matrix0, matrix1, _, _ = random_views(torch.tensor([[512.0, 512.0]]).repeat(count, 1), (64, 64), torch.ones(count))
    points = torch.rand(count, 20, 2) * 63
    exact = torch.linalg.solve(matrix1.double(), matrix0.double())
    seen, front = warp(exact, points.double())
    front &= ((seen > -0.5) & (seen < 63.5)).all(-1)
    behind = exact[:, 2, 2] < 0
    assert behind.sum() > 5 and front[behind].any()
    assert warp(between(matrix0, matrix1), points)[1][front].all()
