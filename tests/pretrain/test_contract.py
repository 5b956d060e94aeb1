"""What every objective promises as the trainer meets it, on real images: it learns, resumes, and shares its work."""

import pytest
import torch
from objectives_synthetic import TASKS, make, real_images
from training_synthetic import assert_same, lines, state, train_in_two, train_killed

from medvit.models.weights import read_state
from medvit.pretrain.dino import Centre


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    pytest.importorskip("skimage", reason="the photograph is in the scikit-image wheel")
    pytest.importorskip("nilearn", reason="the template is in the nilearn wheel")
    path = tmp_path_factory.mktemp("images") / "real.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        torch.save(real_images(), path)
    return str(path)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_a_real_batch_falls(images, tmp_path, task):
    trainer = make(tmp_path, task=task, images=images)
    objective, batch = trainer.objective.train(), {}
    for part in trainer.stream.batches(0, trainer.accumulate):  # of Uni4Eye one with both ranks
        batch |= trainer.augment(part)
    for _ in range(40 if task == "dino_centre" else 0):
        objective(batch, 0.5)
    for module in objective.modules():
        if isinstance(module, Centre):  # targets stand still
            module.eval()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 2e-3)
    values = []
    for _ in range(25):
        torch.manual_seed(0)
        losses = objective(batch, 0.5)
        values.append({"loss": losses.loss.item(), **{name: part.item() for name, part in losses.parts.items()}})
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
    assert all(values[-1][name] < 0.9 * first for name, first in values[0].items()), (values[0], values[-1])


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_goes_on_bit_for_bit(images, tmp_path, task):
    settings = {"task": task, "images": images}
    train_killed(tmp_path / "killed", settings, at=5)
    assert [path.name for path in sorted((tmp_path / "killed/checkpoints").iterdir())] == [
        "step-000000002.pt",
        "step-000000004.pt",
    ]
    make(tmp_path / "whole", **settings).run()
    make(tmp_path / "killed", **settings).run()
    assert_same(state(tmp_path / "whole", 6), state(tmp_path / "killed", 6))
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def test_pictures_are_of_every_kind_of_batch(images, tmp_path):
    make(tmp_path, task="uni4eye", images=images, accumulate=1, batch_size=8, steps=2).run()
    names = {path.name.removesuffix("-000000002.png") for path in (tmp_path / "pictures").iterdir()}
    assert {name.split("_")[0] for name in names} == {"image2d", "image3d"}


@pytest.fixture(scope="module")
def in_two(images, tmp_path_factory):
    """Runs of every objective in two processes: settled under DDP, and with all its draws under DDP and FSDP2."""
    folder = tmp_path_factory.mktemp("two")
    runs = []
    for task in TASKS:
        settings = {"task": task, "images": images, "steps": 3, "save_every": 3}
        runs += [folder / task / "settled", {**settings, "settled": True}]
        runs += [folder / task / "ddp", settings, folder / task / "fsdp", {**settings, "parallel": "fsdp"}]
    train_in_two(*runs)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one(images, in_two, tmp_path, task):
    make(tmp_path, task=task, images=images, settled=True, steps=3).run()
    assert_same(state(tmp_path, 3), state(in_two / task / "settled", 3), 1e-5)
    for one, two in zip(lines(tmp_path), lines(in_two / task / "settled"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_sharded_training_equals_data_parallel(in_two, task):
    ddp, fsdp = in_two / task / "ddp", in_two / task / "fsdp"
    assert_same(read_state(ddp / "encoder.safetensors"), read_state(fsdp / "encoder.safetensors"), 1e-5)
    assert_same(state(ddp, 3), state(fsdp, 3), 1e-5)
    for one, two in zip(lines(ddp), lines(fsdp), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
