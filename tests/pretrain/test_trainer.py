import json
import math
import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training_synthetic import Noisy, Toy, assert_same, lines, make, start, state, train_in_two, train_killed

from medvit import create_model
from medvit.errors import OutputError
from medvit.models.weights import file_sha256, read_state
from medvit.pretrain.mae import MAEObjective
from medvit.pretrain.processes import World
from medvit.pretrain.schedule import Cosine, progress_of
from medvit.pretrain.trainer import NotFinite, Trainer


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_step_is_adamw_on_the_gradient_of_the_batch(tmp_path):
    made = make(tmp_path, noise=0, steps=3, accumulate=2, clip=0.01, weight_decay=0.1)
    toy = Toy(0)
    toy.load_state_dict(made.objective.state_dict())
    made.run()
    vectors = [p for n, p in toy.encoder.named_parameters() if p.ndim == 1 or "token" in n]
    matrices = [p for n, p in toy.encoder.named_parameters() if p.ndim > 1 and "token" not in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    images, schedule = Noisy().images, Cosine(3e-2, warmup=0.2)
    for step in range(3):
        keys = [made.stream.keys(2 * step), made.stream.keys(2 * step + 1)]
        batch = images[[key.item for part in keys for key in part]]
        for group in reference.param_groups:
            group["lr"] = schedule(step / 2)
        loss = toy({"image": batch}, step / 2).loss
        reference.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in toy.parameters() if p.requires_grad], 0.01)
        reference.step()
        toy.after_step(step / 2)
    trained = state(tmp_path, 3)["objective"]
    assert_same(toy.state_dict(), trained, 1e-6)
    assert not torch.equal(trained["encoder.patch.weight"], make(tmp_path / "x").objective.encoder.patch.weight)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    train_killed(tmp_path / "killed", {}, at=7)
    make(tmp_path / "whole").run()
    assert sorted(p.name for p in (tmp_path / "killed/checkpoints").iterdir()) == ["step-000000004.pt"]
    assert not (tmp_path / "killed/encoder.safetensors.part").exists()
    make(tmp_path / "killed").run()
    assert_same(state(tmp_path / "whole"), state(tmp_path / "killed"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")
    assert [line["step"] for line in lines(tmp_path / "killed")] == [3, 4, 6, 8, 9, 12]
    assert (tmp_path / "whole/encoder.safetensors").read_bytes() == (
        tmp_path / "killed/encoder.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The same run in two processes, by DDP and by FSDP2, and the latter stopped and resumed."""
    folder = tmp_path_factory.mktemp("two")
    whole = {"noise": 0, "accumulate": 2}
    train_in_two(folder / "ddp", whole, folder / "fsdp", {**whole, "parallel": "fsdp", "keep": 9})
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, two_processes, parallel):
    make(tmp_path, noise=0, accumulate=2).run()
    assert_same(state(tmp_path), state(two_processes / parallel), 2e-6)
    assert len(lines(tmp_path)) == len(lines(two_processes / parallel))
    for one, two in zip(lines(tmp_path), lines(two_processes / parallel), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_sharded_state_goes_on_in_one_process(tmp_path, two_processes):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-000000008.pt").write_bytes((two_processes / "fsdp/checkpoints/step-000000008.pt").read_bytes())
    make(tmp_path, noise=0, accumulate=2).run()
    assert_same(state(tmp_path), state(two_processes / "fsdp"), 2e-6)


def test_batches_do_not_depend_on_how_they_are_accumulated_or_loaded(tmp_path):
    make(tmp_path / "one", noise=0).run()
    make(tmp_path / "four", noise=0, accumulate=4).run()
    assert_same(state(tmp_path / "one")["objective"], state(tmp_path / "four")["objective"], 1e-6)
    make(tmp_path / "alone").run()
    make(tmp_path / "workers", num_workers=2).run()
    assert_same(state(tmp_path / "alone"), state(tmp_path / "workers"))


def test_recomputing_changes_nothing(tmp_path):
    make(tmp_path / "kept").run()
    trainer = make(tmp_path / "again", recompute=True)
    trainer.run()
    assert_same(state(tmp_path / "kept"), state(tmp_path / "again"))
    assert trainer.objective.encoder.blocks[0].forward.func.__name__ == "_checkpointed"


def test_of_a_student_and_a_teacher_the_student_is_recomputed():
    from medvit.pretrain.trainer import _recompute

    objective, student = Toy(), Toy().encoder
    objective.student = student
    objective.encoder.requires_grad_(False)  # the teacher, which is what is exported
    _recompute(objective)
    assert all("forward" in vars(block) for block in student.blocks)
    assert not any("forward" in vars(block) for block in objective.encoder.blocks)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precisions(tmp_path, precision):
    trainer = make(tmp_path, precision=precision, noise=0)
    seen = []
    trainer.objective.encoder.patch.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    trainer.run()
    make(tmp_path / "float32", noise=0).run()
    assert set(seen) == {getattr(torch, precision)}
    first, last = (lines(folder)[-1]["loss"] for folder in (tmp_path / "float32", tmp_path))
    assert last == pytest.approx(first, rel=0.1)
    assert all(v.dtype == torch.float32 for v in read_state(tmp_path / "encoder.safetensors").values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention_is_fused_where_that_is_fast(tmp_path, precision):
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2}
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    objective = MAEObjective(create_model("mae", in_channels=1, **sizes, **decoder))
    Trainer(objective, Noisy(), output_dir=tmp_path, batch_size=8, steps=2, precision=precision, device="cpu").run()
    fused = {block.attn.fused_attn for block in objective.encoder.blocks}
    assert fused == {precision == "float32"}


class Sick(Toy):
    """Not finite for some calls, in the loss or only in the gradient."""

    def __init__(self, calls, gradient=False):
        super().__init__(0)
        self.calls, self.gradient, self.seen = calls, gradient, 0

    def forward(self, batch, progress):
        losses = super().forward(batch, progress)
        self.seen += 1
        if self.seen in self.calls:
            bad = (self.encoder.patch.weight * 0).sum().sqrt() if self.gradient else losses.loss * math.nan
            return losses._replace(loss=losses.loss + bad)
        return losses


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped(tmp_path, gradient):
    sick = Sick({3, 4}, gradient)
    result = Trainer(sick, Noisy(), output_dir=tmp_path, batch_size=4, steps=6, device="cpu", patience=3).run()
    assert result["skipped"] == 2 and math.isfinite(result["loss"])
    assert int(sick.updates) == 4
    assert all(p.isfinite().all() for p in sick.parameters())


def test_too_many_of_them_stop_the_run_with_a_state(tmp_path):
    sick = Sick(set(range(3, 99)))
    trainer = Trainer(sick, Noisy(), output_dir=tmp_path, batch_size=4, steps=20, device="cpu", patience=3)
    with pytest.raises(NotFinite, match=r"step 5: .* 3 steps in a row .*loss nan.*Lower the learning rate"):
        trainer.run()
    assert all(v.isfinite().all() for v in state(tmp_path, 5)["objective"].values())


class Averaging(Sick):
    """Its buffer has seen what was not finite before the loss is known."""

    def __init__(self, calls):
        super().__init__(calls)
        self.register_buffer("centre", torch.zeros(12))

    def forward(self, batch, progress):
        losses = super().forward(batch, progress)
        vector = self.encoder.embed(batch["image"]).mean(0).detach()
        self.centre.lerp_(vector * (math.nan if self.seen in self.calls else 1), 0.5)
        return losses


def test_a_skipped_step_leaves_no_trace_in_buffers(tmp_path):
    sick = Averaging({3})
    result = Trainer(sick, Noisy(), output_dir=tmp_path, batch_size=4, steps=6, device="cpu").run()
    assert result["skipped"] == 1 and math.isfinite(result["loss"])
    assert sick.centre.isfinite().all() and sick.centre.any()


def test_half_precision_that_never_gets_finite_is_counted_and_stops(tmp_path):
    sick = Sick(set(range(1, 99)), gradient=True)
    settings = {"batch_size": 4, "steps": 60, "device": "cpu", "patience": 3, "precision": "float16"}
    trainer = Trainer(sick, Noisy(), output_dir=tmp_path, **settings)
    with pytest.raises(NotFinite, match=r"step 19: .* 3 steps in a row"):  # 16 halve the factor of 65536 to 1
        trainer.run()
    assert state(tmp_path, 19)["skipped"] == 19 and int(sick.updates) == 0


def test_a_watcher_that_fails_costs_nothing_and_is_called_again(tmp_path):
    def failing(objective):
        raise RuntimeError("no such file")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such file"):
            make(tmp_path, watchers=[failing]).run()
        assert state(tmp_path)["step"] == 12 and (tmp_path / "encoder.safetensors").exists()
    assert make(tmp_path, watchers=[lambda objective: {"seen": 1.0}]).run()["seen"] == 1
    assert lines(tmp_path)[-1]["step"] == 12 and lines(tmp_path)[-1]["seen"] == 1
    assert make(tmp_path, watchers=[failing]).run() == {}


def test_the_encoder_is_there_before_the_state_that_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("medvit.pretrain.checkpoint.Checkpoints.save", full)
        with pytest.raises(OSError, match="no space left"):
            make(tmp_path, save_every=99).run()
    assert (tmp_path / "encoder.safetensors").exists() and not (tmp_path / "checkpoints").exists()
    make(tmp_path, save_every=99).run()
    assert json.loads((tmp_path / "encoder.safetensors.json").read_text())["step"] == 12


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-3},
        {"weight_decay": 0.5},
        {"betas": (0.1, 0.2)},
        {"eps": 1.0},
        {"clip": 1.0},
        {"precision": "bfloat16"},
    ],
)
def test_no_run_goes_on_with_other_settings(tmp_path, settings):
    make(tmp_path, steps=2).run()
    with pytest.raises(OutputError, match=rf"other settings \({next(iter(settings))}: "):
        make(tmp_path, steps=2, **settings).run()


def test_a_state_with_other_tensors_is_refused(tmp_path):
    make(tmp_path, steps=2).run()
    trainer = make(tmp_path, steps=2)
    trainer.objective.register_buffer("centre", torch.zeros(3))
    with pytest.raises(OutputError, match=r"of another objective or network, .* other tensors \(centre\)"):
        trainer.run()


def test_processes_that_find_different_states_are_refused(tmp_path):
    """As two machines do that share no folder."""
    make(tmp_path / "0", steps=4).run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        start(tmp_path / str(rank), {"steps": 4}, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert all(process.returncode for process in processes), said
    told = "must be the same for all processes, which found [4, -1]; give them one folder"
    assert any(told in text for text in said), said  # the other one may only see that its peer is gone
    assert not (tmp_path / "1").exists()


def test_a_state_of_another_run_is_refused(tmp_path):
    make(tmp_path).run()
    with pytest.raises(OutputError, match=r"batch_size: 8 there, 4 now.*seed: 11 there, 12 now"):
        make(tmp_path, batch_size=4, seed=12).run()
    make(tmp_path, batch_size=4, seed=12, resume=False, steps=2).run()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000002.pt"]
    assert [line["step"] for line in lines(tmp_path)] == [2]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    assert make(tmp_path).run()["loss"] > 0
    before = lines(tmp_path)
    assert make(tmp_path).run() == {}
    assert lines(tmp_path) == before


def test_the_encoder_is_exported_with_what_it_is(tmp_path):
    trainer = make(tmp_path, description={"network_def": {"name": "toy"}})
    trainer.run()
    note = json.loads((tmp_path / "encoder.safetensors.json").read_text())
    assert note["sha256"] == file_sha256(tmp_path / "encoder.safetensors")
    assert note["network_def"] == {"name": "toy"} and note["step"] == note["steps"] == 12
    assert_same(read_state(tmp_path / "encoder.safetensors"), trainer.objective.encoder.state_dict())


def test_watchers_and_pictures_leave_no_trace(tmp_path):
    make(tmp_path / "plain").run()
    trainer, modes = make(tmp_path / "watched", watch_every=4), []

    def watcher(objective):
        modes.append((objective.training, torch.is_grad_enabled()))
        return {"drawn": float(torch.rand(()))}

    trainer.watchers = (watcher,)
    trainer.objective.pictures = lambda batch: {"first": batch["image"][0, 0].sigmoid()}
    assert 0 <= trainer.run()["drawn"] < 1
    assert modes == [(False, False)] * 3
    assert_same(state(tmp_path / "plain"), state(tmp_path / "watched"))
    names = sorted(path.name for path in (tmp_path / "watched/pictures").iterdir())
    assert names == [f"first-{step:09d}.png" for step in (4, 8, 12)]


def test_sources_take_turns(tmp_path):
    seen = []
    small, large = Noisy(6), Noisy(10)
    large.images = large.images.repeat(1, 1, 2, 2)
    toy = Toy()
    toy.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[-1]))
    Trainer(toy, [small, large], output_dir=tmp_path, batch_size=4, accumulate=2, epochs=2, device="cpu").run()
    assert seen == [8, 16] * 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "half"}, r"precision must be one of .*got 'half'"),
        ({"parallel": "fsdp", "precision": "float16"}, "use bfloat16"),
        ({"batch_size": 9, "accumulate": 2}, r"multiple of accumulate x processes = 2 x 1, got 9; use 8"),
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 3}, "either steps or epochs"),
        ({"steps": 0}, "at least one step"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_a_description_must_fit_into_json(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        make(tmp_path, description={"folder": tmp_path})


def test_a_run_that_trained_something_else_is_not_gone_on_with(tmp_path):
    settings = {"output_dir": tmp_path, "batch_size": 8, "steps": 1, "device": "cpu"}
    Trainer(Toy(), Noisy(), **settings).run()
    toy = Toy()
    toy.encoder.patch.requires_grad_(False)
    count = sum(p.numel() for p in Toy().parameters() if p.requires_grad)
    less = count - sum(p.numel() for p in toy.encoder.patch.parameters())
    with pytest.raises(OutputError, match=f"other settings .trained_parameters: {count} there, {less} now"):
        Trainer(toy, Noisy(), **settings).run()


def test_nothing_to_train(tmp_path):
    trainer = make(tmp_path)
    trainer.objective.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        trainer.run()


def test_progress_runs_from_zero_to_one():
    assert [progress_of(step, 5) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert progress_of(0, 1) == 0


def test_the_callers_group_of_processes_is_taken_as_it_is():
    """As torch.multiprocessing.spawn leaves it, without a word in the environment."""
    with mock.patch.multiple(dist, is_initialized=lambda: True, get_rank=lambda: 2, get_world_size=lambda: 4):
        world = World("cpu")
    assert (world.rank, world.size) == (2, 4)
    assert (World("cpu").rank, World("cpu").size) == (0, 1)
