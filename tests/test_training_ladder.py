"""Where a training runs out of memory it goes on with less, to the same result, and what a step took is remembered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from src import optimizations
from src.errors import ExitCode, UserError
from src.model_shapes import bundled_shapes
from src.train_config import TrainRun
from src.training import loop
from src.training.adapter_learning import AdapterLearning
from src.training.batches import Batch
from src.training.memory import TrainingMemory
from src.training_memory import TrainingNeed, predict
from src.training_plan import choose, describe, kind_of
from tests.tiny import training

GIB = 2**30
STEPS = ("--max_steps", "4", "--batch_size", "4", "--gradient_accumulation", "2", "--checkpoint_steps", "4", "--no-samples")


CLASS = ("--class_prompt", "a photo of a thing", "--class_dir", "{}", "--set", "train.num_class_images=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = training.photos(tmp_path_factory.mktemp("data") / "photos", count=5)
    mask = Image.new("L", (training.SIZE_PX, training.SIZE_PX), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(folder / "0001-masklabel.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.model(tmp_path_factory.mktemp("models") / "tiny-sd1")


def is_checkpointing(unet: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in unet.modules())


def run_short_of(fits, data: Path, model: Path, output: Path, monkeypatch, *arguments: str) -> int:
    """A training on a card that holds what ``fits(examples, is checkpointing)`` says; else the backward pass runs out."""
    found = loop.batch_loss

    def limited(trainee, batch, *others):
        loss = found(trainee, batch, *others)
        if not fits(len(batch.latents), is_checkpointing(trainee.unet)):
            (loss / 2).backward(retain_graph=True)  # some gradients are there already when it happens
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(loop, "batch_loss", limited)
    return training.run(data, model, output, *STEPS, *arguments)


@pytest.mark.parametrize(
    ("fits", "said", "more"),
    [
        (lambda examples, checkpointing: checkpointing, "gradient checkpointing, which takes longer", ()),
        (
            lambda examples, checkpointing: checkpointing,
            "gradient checkpointing, which takes longer",
            ("--train_text_encoder",),
        ),
        (lambda examples, checkpointing: examples == 1, "each batch in 4 parts, one after the other", ()),
        (lambda examples, checkpointing: examples == 1, "each batch in 4 parts, one after the other", ("--masked_loss",)),
        (lambda examples, checkpointing: examples <= 2, "each batch in 2 parts, one after the other", CLASS),
    ],
    ids=["checkpointing", "checkpointing text", "parts", "parts masked", "parts with a class"],
)
def test_less_memory_learns_the_same(
    fits, said: str, more: tuple[str, ...], data: Path, model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    more = tuple(word.format(data) for word in more)
    with monkeypatch.context() as patch:
        assert run_short_of(fits, data, model, tmp_path / "short", patch, *more) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory")]
    assert lines[-1] == f"memory  ran out in step 1; going on with {said}"
    assert f"memory ran out in step 1; going on with {said}" in (tmp_path / "short" / "log.jsonl").read_text()
    assert training.run(data, model, tmp_path / "plenty", *STEPS, *more) == 0
    short, plenty = (training.state(tmp_path / name / "checkpoint-4") for name in ("short", "plenty"))
    assert short.keys() == plenty.keys()
    for name, tensor in plenty.items():
        torch.testing.assert_close(short[name], tensor, rtol=1e-3, atol=2e-6, msg=name)


def test_the_last_rung_is_one_line_with_a_way_out(data: Path, model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    code = run_short_of(lambda examples, checkpointing: False, data, model, tmp_path / "out", monkeypatch)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == ExitCode.OUT_OF_MEMORY
    assert [line.split(";")[1] for line in lines if line.startswith("memory")] == [
        " going on with gradient checkpointing, which takes longer",
        " going on with each batch in 2 parts, one after the other",
        " going on with each batch in 4 parts, one after the other",
    ]
    assert "out of memory (step 1, resolution 64, batch size 4, rank 4); use --quantize nf4" in lines[-1]


def test_what_the_user_decided_stands(data: Path, model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    fits = lambda examples, checkpointing: examples == 1 or checkpointing  # noqa: E731
    assert run_short_of(fits, data, model, tmp_path / "out", monkeypatch, "--no-gradient_checkpointing") == 0
    told = capsys.readouterr().err
    assert "each batch in 4 parts" in told
    assert "going on with gradient checkpointing" not in told


def test_parts_of_a_batch_are_all_of_it() -> None:
    rows = torch.arange(5.0)
    batch = Batch(
        latents=rows[:, None, None, None], noise=rows[:, None, None, None] + 10, timesteps=rows.long(), weights=rows + 1,
        mask=None, tokens=rows[:, None, None], pooled=None, time_ids=None, captions=tuple("abcde"), chunks=2, preserved=(1, 4),
    )  # fmt: skip
    parts = batch.parts(2)
    assert [part.captions for part, _ in parts] == [("a", "b"), ("c", "d", "e")]
    assert [part.preserved for part, _ in parts] == [(1,), (2,)]
    assert sum(share * float(part.weights.mean()) for part, share in parts) == pytest.approx(float(batch.weights.mean()))
    assert [len(part.latents) for part, _ in batch.parts(9)] == [1] * 5
    assert sum(share for _, share in batch.parts(3)) == pytest.approx(1)


# -- what a step took


def memory_of(tmp_path: Path, lines: list[str], processes: int = 1, **changes) -> tuple[TrainingMemory, SimpleNamespace]:
    """The memory of a training of SD 1.5 on a card of 6 GiB that is not here."""
    run = TrainRun()
    run.paths.cache = str(tmp_path)
    run.train = dataclasses.replace(run.train, mixed_precision="fp16", **changes)
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=processes, is_main_process=True)
    memory = TrainingMemory(run, AdapterLearning(run), accelerator, lines.append)
    model = SimpleNamespace(config_folder=tmp_path, native_size_px=512, precision="fp16", device_name="a card", name="sd15")
    return memory, model


@pytest.fixture
def card(monkeypatch) -> SimpleNamespace:
    """What a card of 6 GiB says; its numbers may be changed."""
    said = SimpleNamespace(free=6 * GIB, peak=5 * GIB)
    monkeypatch.setattr("src.training.memory.read_shapes", lambda folder: bundled_shapes("sd15"))
    monkeypatch.setattr(optimizations, "memory_budget", lambda device, options: said.free)
    monkeypatch.setattr(optimizations, "room_bytes", lambda device: said.free)
    monkeypatch.setattr(optimizations, "peak_bytes", lambda device: said.peak)
    monkeypatch.setattr(optimizations, "reset_peak", lambda device, clean: None)
    monkeypatch.setattr(optimizations, "free_memory", lambda: None)
    return said


def begun(tmp_path: Path, lines: list[str], **more) -> TrainingMemory:
    memory, model = memory_of(tmp_path, lines, **more)
    memory.ask()
    memory.plan(model)
    return memory


def learn(memory: TrainingMemory, steps: int) -> None:
    for step in range(steps):
        memory.begin_step(has_state=step > 0)
        memory.end_step()


def test_what_steps_take_is_measured_and_the_next_plan_knows_it(card, tmp_path: Path) -> None:
    lines: list[str] = []
    memory = begun(tmp_path, lines, samples=False)
    assert "predicted peak" in lines[0]
    learn(memory, 1)  # the optimizer has no numbers yet
    memory.end_measuring()
    assert not (tmp_path / "measured_peaks.json").exists()
    learn(memory, 20)
    begun(tmp_path, lines, samples=False)
    assert lines[1] == "plan    no gradient checkpointing, measured peak 5.00 of 6.00 GiB"
    begun(tmp_path, lines, samples=False, rank=8)  # another adapter was never measured
    assert "predicted peak" in lines[2]
    ((key, peaks),) = json.loads((tmp_path / "measured_peaks.json").read_bytes()).items()  # the file of the drawing
    assert key.startswith("training | a card | sd15")
    assert peaks == {"no gradient checkpointing": 5 * GIB}
    card.peak = 4 * GIB  # a session that saw smaller batches
    learn(begun(tmp_path, lines, samples=False), 20)
    assert json.loads((tmp_path / "measured_peaks.json").read_bytes())[key] == peaks


def test_pictures_that_are_judged_are_no_steps(card, tmp_path: Path) -> None:
    memory = begun(tmp_path, [])
    learn(memory, 4)
    memory.end_measuring()
    card.peak = 6 * GIB  # by samples
    learn(memory, 20)
    ((_, peaks),) = json.loads((tmp_path / "measured_peaks.json").read_bytes()).items()
    assert peaks == {"no gradient checkpointing": 5 * GIB}


def test_a_plan_that_failed_is_not_made_again(card, tmp_path: Path) -> None:
    lines: list[str] = []
    memory = begun(tmp_path, lines, batch_size=2, samples=False)
    for _ in range(2):
        memory.step_down(1)
    assert memory.checkpoints_gradients
    assert memory.parts == 2
    learn(memory, 20)
    with pytest.raises(UserError, match="use --quantize nf4"):
        memory.step_down(21)
    lines.clear()
    again = begun(tmp_path, lines, batch_size=2, samples=False)
    assert lines[0].startswith(
        "plan    gradient checkpointing, ran out with 6.00 GiB the last time, and 6.00 are free now; does not fit"
    )
    assert lines[1] == "plan    each batch in 2 parts, one after the other, which fitted the last time"
    assert again.parts == 2
    card.free = round(6.2 * GIB)  # no more than another window of the desktop
    assert begun(tmp_path, lines, batch_size=2, samples=False).checkpoints_gradients
    card.free = 8 * GIB
    assert begun(tmp_path, lines, batch_size=2, samples=False).parts == 1
    assert "no gradient checkpointing, ran out with 6.00 GiB the last time, and 8.00 are free now" in lines[-1]


def test_no_advice_that_the_failure_refutes(card, tmp_path: Path) -> None:
    lines: list[str] = []
    memory = begun(tmp_path, lines, samples=True)
    memory.step_down(1)
    with pytest.raises(UserError):
        memory.step_down(1)
    begun(tmp_path, lines, samples=True)
    assert "--no-samples" not in lines[-1]  # would change nothing of a step


def test_others_that_took_the_memory_leave_no_mark(card, tmp_path: Path) -> None:
    lines: list[str] = []
    memory = begun(tmp_path, lines, samples=False)
    learn(memory, 20)
    card.free = 4 * GIB  # a game was started
    memory.step_down(21)
    card.free = 6 * GIB
    assert not begun(tmp_path, lines, samples=False).checkpoints_gradients
    assert lines[-1] == "plan    no gradient checkpointing, measured peak 5.00 of 6.00 GiB"


def test_one_of_several_processes_does_not_go_its_own_way(card, tmp_path: Path) -> None:
    memory = begun(tmp_path, [], processes=2)
    with pytest.raises(UserError, match="use --gradient_checkpointing") as caught:
        memory.step_down(7)
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY


def test_a_known_step_stands_for_the_predicted_one() -> None:
    shapes, need = bundled_shapes("sd15"), TrainingNeed(512, samples=False)
    phases = predict(shapes, dataclasses.replace(need, gradient_checkpointing=False))
    budget = next(phase for phase in phases if phase.name == "train").total_bytes - 1
    assert choose(shapes, need, budget).need.gradient_checkpointing  # by prediction it would not fit
    plan = choose(shapes, need, budget, known={kind_of(False): budget})
    assert not plan.need.gradient_checkpointing
    assert plan.fits
    assert describe(plan) == f"no gradient checkpointing, measured peak {budget / GIB:.2f} of {budget / GIB:.2f} GiB"
    whole = dataclasses.replace(need, gradient_checkpointing=False)
    assert not choose(shapes, whole, budget, known={kind_of(False): budget + 1}).fits
