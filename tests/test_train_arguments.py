"""What was typed after train_lora, as settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.errors import ExitCode, UserError
from src.train_arguments import apply_typed, build_run
from src.train_config import TrainRun


def test_a_file_of_prompts_is_read_when_it_is_named_and_never_again(tmp_path: Path) -> None:
    """A prompt of a checkpoint that ends in .txt is no file."""
    file = tmp_path / "prompts.txt"
    file.write_text("a note called todo.txt\n\na dog\n")
    run = TrainRun()
    apply_typed(run, {"train.sample_prompts": [str(file), "a cat"]})
    prompts = ("a note called todo.txt", "a dog", "a cat")
    assert run.train.sample_prompts == prompts
    apply_typed(run, {"train.max_steps": 5})
    assert run.train.sample_prompts == prompts
    file.write_text("a bird")
    apply_typed(run, {"set": [f"train.sample_prompts={file}"]})
    assert run.train.sample_prompts == ("a bird",)


@pytest.mark.parametrize("name", ["train.rank", "train.max_steps", "train.learning_rate"])
def test_a_number_of_hundreds_of_digits_is_one_line(name: str) -> None:
    for typed in ({name: 10**400}, {"set": [f"{name}=1{'0' * 400}"]}):
        with pytest.raises(UserError, match=f"^{name}: the number has hundreds of digits; give a smaller one$") as caught:
            build_run(typed)
        assert caught.value.exit_code == ExitCode.USAGE
