"""The README tells the truth: its commands parse, the quick ones run, its map names every file, its pictures are there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from src import cli, example_subject, finetune_arguments, orders, prepare_dataset, train_arguments
from src.arguments import build_config, parse_arguments
from src.scratch import __main__ as scratch
from src.scratch.settings import PHASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = list(
    dict.fromkeys(
        line.split("   #")[0].strip()
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for line in block.splitlines()
        if line.strip()
    )
)
TRAINING = [line for line in LINES if "src.train_lora " in line]
FINETUNING = [line for line in LINES if "src.finetune " in line]
SCRATCH = [line for line in LINES if "src.scratch " in line]
PREPARING = [line for line in LINES if "src.prepare_dataset " in line]
COMMANDS = [line for line in LINES if line.startswith("python main.py")]
QUICK = ("--estimate-vram", "--list-schedulers", "--help")


def arguments_of(command: str) -> list[str]:
    return shlex.split(command)[2:]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses_and_its_settings_exist(command: str) -> None:
    build_config(parse_arguments(arguments_of(command)))


@pytest.mark.parametrize("command", [line for line in COMMANDS if any(flag in line for flag in QUICK)])
def test_quick_commands_run(command: str, capsys) -> None:
    assert cli.main(arguments_of(command)) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [line for line in COMMANDS if "embedded" in line or "--from-image docs/demo.png" in line],
    ids=lambda line: line[15:60],
)
def test_commands_of_the_embedded_model_draw(command: str, capsys, monkeypatch, tmp_path) -> None:
    """As written, in the project's folder; only the pictures go elsewhere, and two steps must do."""
    monkeypatch.chdir(ROOT)
    assert cli.main([*arguments_of(command), "--output", str(tmp_path), "--steps", "2"]) == 0
    assert list(tmp_path.glob("gen_*.png"))


@pytest.mark.parametrize("command", TRAINING, ids=lambda line: line[-60:])
def test_training_commands_parse_and_their_settings_exist(command: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    train_arguments.build_run(train_arguments.parse_arguments(words[words.index("src.train_lora") + 1 :]))


@pytest.mark.parametrize("command", FINETUNING, ids=lambda line: line[-60:])
def test_finetuning_commands_parse_and_their_settings_exist(command: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    finetune_arguments.build_run(finetune_arguments.parse_arguments(words[words.index("src.finetune") + 1 :]))


@pytest.mark.parametrize("command", PREPARING, ids=lambda line: line[-60:])
def test_preparing_commands_parse_and_their_settings_exist(command: str) -> None:
    words = shlex.split(command)
    typed = prepare_dataset.command_line().parse(words[words.index("src.prepare_dataset") + 1 :])
    assert prepare_dataset.read_config(typed).src


@pytest.mark.parametrize("command", SCRATCH, ids=lambda line: line[-60:])
def test_commands_of_the_phases_parse_and_their_settings_exist(command: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    typed = scratch.command_line().parse(words[words.index("src.scratch") + 1 :])
    assert typed["words"] in ("all", *PHASES, *scratch.TOOLS, scratch.UNPACK)
    assert scratch.read_settings(typed, typed["words"])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= targets


def test_the_example_of_training_is_made_of_commands_that_parse(monkeypatch) -> None:
    """``make demo-lora``; and what it shows to be kept is what its settings ask to be kept."""
    monkeypatch.chdir(ROOT)
    shown = subprocess.run(["make", "--dry-run", "demo-lora"], capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line.partition("python ")[2]) for line in shown.splitlines() if "/python " in line]
    typed = {words[1] if words[0] == "-m" else words[0]: words for words in reversed(commands)}
    train = train_arguments.build_run(train_arguments.parse_arguments(typed["src.train_lora"][2:])).train
    assert prepare_dataset.command_line().parse(typed["src.prepare_dataset"][2:])
    assert example_subject.command_line().parse(typed["src.example_subject"][2:])
    drawing = parse_arguments(typed["main.py"][1:])
    subject, others = (job.request for job in orders.read_jobs(drawing, build_config(drawing), print))
    assert "yellow" in subject.prompt
    assert train.sample_prompts[0] == "a gelato on a yellow background"
    assert (subject.num_images, others.prompt) == (10, train.class_prompt)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in script.splitlines()
    assert "make test " in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_linked_files_and_headings_are_there(page: Path) -> None:
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}, heading


def test_the_file_map_names_every_source_file() -> None:
    named = set(re.findall(r"^  ([a-z_]+(?:\.py|/))", README.partition("## File map")[2], re.MULTILINE))
    sources = {path.name for path in (ROOT / "src").glob("*.py")} - {"__init__.py"} | {
        f"{path.parent.name}/" for path in (ROOT / "src").glob("*/__init__.py")
    }
    assert named == sources


def test_python_example_has_only_names_that_exist() -> None:
    """Run the README's Python block up to the point where a model would be fetched."""
    from src.generator import TextToImageGenerator

    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    head = block.partition("gen.load_model()")[0]
    scope: dict[str, object] = {}
    exec(compile(head, "README.md", "exec"), scope)
    assert isinstance(scope["gen"], TextToImageGenerator)
    for name in set(re.findall(r"gen\.(\w+)\(", block)):
        assert callable(getattr(TextToImageGenerator, name))
