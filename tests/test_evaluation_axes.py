"""Axes: what is typed, what it puts over the flags, and what is refused."""

from pathlib import Path

import pytest

from src.errors import UserError
from src.evaluation.axes import check_axes, parse_axis


@pytest.mark.parametrize(
    ("text", "target", "values"),
    [
        ("steps=10,20, 30", "generation.num_inference_steps", ("10", "20", "30")),
        ("cfg=3", "generation.guidance_scale", ("3",)),
        ("Guidance=3,7.5", "generation.guidance_scale", ("3", "7.5")),
        ("sampler=Euler a,ddim", "generation.scheduler", ("Euler a", "ddim")),
        ("clip-skip=1,2", "generation.clip_skip", ("1", "2")),
        ("seed=3-5", "generation.seed", ("3", "4", "5")),
        ("prompt=a cat, grey|a {dog|fox}", "prompt", ("a cat, grey", "a {dog|fox}")),
        ("model=embedded,./a", "model", ("embedded", "./a")),
        ("model=a,b.safetensors|c", "model", ("a,b.safetensors", "c")),
        ("precision=fp32,bf16", "model.precision", ("fp32", "bf16")),
        ("lora=none,a.safetensors:0.5", "lora", ("none", "a.safetensors:0.5")),
        ("generation.strength=0.4", "generation.strength", ("0.4",)),
    ],
)
def test_axes_are_read(text: str, target: str, values: tuple[str, ...]) -> None:
    axis = parse_axis("--x", text)
    assert (axis.target, axis.values) == (target, values)


def test_prompts_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# two\na cat\n\na dog, wet\n")
    assert parse_axis("--y", f"prompt=@{tmp_path / 'prompts.txt'}").values == ("a cat", "a dog, wet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "NAME=VALUE"),
        ("steps=", "NAME=VALUE"),
        ("stepps=3", "did you mean steps?"),
        ("batch_size=1,2", "the same at any"),
        ("paths.outputs=a", "is no axis"),
        ("steps=3,,4", "a value is empty"),
        ("steps=3,3", "stands there twice"),
        ("seed=5-1", "a range goes up"),
        ("seed=1-1000", "at most 100"),
        ("seed=-1,5", "another one in each cell"),
    ],
)
def test_what_is_no_axis_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_axis("--x", text)


def test_a_value_is_put_over_what_was_typed() -> None:
    typed = {"lora": ["base.safetensors:0.7"], "generation.seed": 1}
    assert parse_axis("--x", "seed=7").over(typed, 0) == {**typed, "generation.seed": "7"}
    assert parse_axis("--x", "lora=none,a:0.5").over(typed, 0)["lora"] == []
    assert parse_axis("--x", "lora=none,a:0.5").over(typed, 1)["lora"] == ["base.safetensors:0.7", "a:0.5"]
    assert parse_axis("--x", "lora_scale=0.2").over(typed, 0)["lora"] == ["base.safetensors:0.2"]
    assert typed["lora"] == ["base.safetensors:0.7"]


def test_texts_are_no_ranges() -> None:
    assert parse_axis("--x", "prompt=1984-1999").values == ("1984-1999",)
    assert parse_axis("--x", "lora=1-3").values == ("1-3",)
    assert parse_axis("--x", "steps=2-4").values == ("2", "3", "4")


def test_labels() -> None:
    assert parse_axis("--x", "steps=10").label(0) == "steps 10"
    assert parse_axis("--x", "lora_scale=0.5").label(0) == "lora scale 0.5"
    assert parse_axis("--x", "lora=none,some/dog.safetensors:0.5").label(1) == "dog 0.5"
    assert parse_axis("--x", "lora=none").label(0) == "no LoRA"
    assert parse_axis("--x", "model=./some/where/tiny").label(0) == "tiny"
    assert parse_axis("--x", "prompt=a cat").label(0) == "a cat"


@pytest.mark.parametrize(
    ("axes", "typed", "message"),
    [
        (["steps=1", "num_inference_steps=2"], {}, "both vary"),
        (["lora_scale=1"], {}, "nothing to weigh"),
        (["steps=1"], {"generation.num_inference_steps": 3}, "leave the flag out"),
        (["seed=1"], {"generation.seed": 3}, "leave the flag out"),
        (["model=a"], {"model": "b"}, "leave the flag out"),
    ],
)
def test_axes_without_effect_are_refused(axes: list[str], typed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_axes([parse_axis("--x", text) for text in axes], typed)


def test_axes_that_go_together() -> None:
    check_axes([parse_axis("--x", "lora=a,b"), parse_axis("--y", "lora_scale=1,2")], {})
    check_axes([parse_axis("--x", "lora_scale=1,2"), parse_axis("--y", "seed=1-3")], {"lora": ["a"]})
