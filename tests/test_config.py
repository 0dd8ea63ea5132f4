"""Settings: types, precedence, did-you-mean; YAML without its traps."""

from pathlib import Path

import pytest

from src.arguments import build_config, help_text, is_given, parse_arguments
from src.config import AppConfig, ModelConfig, check_machine, load_config, parse_assignment, set_value, setting_names
from src.errors import ExitCode, UserError
from src.strict_yaml import parse_scalar, read_yaml


def config_of(*argv: str) -> AppConfig:
    return build_config(parse_arguments(argv))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("generation.num_inference_steps=30", 30),
        ("generation.steps=30", 30),
        ("generation.guidance_scale=7", 7.0),
        ("generation.guidance_scale=1e-4", 1e-4),
        ("generation.seed=null", None),
        ("generation.seed=none", None),
        ("generation.width=768", 768),
        ("model.offline=true", True),
        ("generation.negative_prompt=a, b: c # d", "a, b: c # d"),
        ("generation.negative_prompt=1.50", "1.50"),
        ("model.revision=0123", "0123"),
        ("optimization.max_vram_gb=4", 4.0),
    ],
)
def test_set_converts_to_the_fields_type(assignment: str, expected: object) -> None:
    config = AppConfig()
    name, text = parse_assignment(assignment)
    set_value(config, name, text)
    section, _, key = {"generation.steps": "generation.num_inference_steps"}.get(name, name).partition(".")
    value = getattr(getattr(config, section), key)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("generation.stps=1", "did you mean 'generation.steps'"),
        ("width=512", "did you mean 'generation.width'"),
        ("nothing.at_all=1", "the sections are model, optimization"),
        ("generation.width=3.5", "expected a whole number, got 3.5"),
        ("generation.width=wide", "expected a whole number, got 'wide'"),
        ("model.offline=no", "expected true or false, got 'no'"),
        ("generation.width=true", "expected a whole number, got True"),
        ("generation.width=" + "9" * 400, "the number has hundreds of digits"),
        ("generation.guidance_scale=-" + "9" * 400, "the number has hundreds of digits"),
        ("generation.seed=" + "9" * 5000, "thousands of digits"),
        ("generation.width", "section.name=value"),
        ("generation.__class__=1", "unknown setting"),
    ],
)
def test_wrong_settings_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        set_value(AppConfig(), *parse_assignment(assignment))
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_typo_in_python_is_an_error() -> None:
    with pytest.raises(AttributeError):
        AppConfig().generation.widht = 512


def test_precedence_is_default_file_set_flag(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("generation:\n  guidance_scale: 3\n  num_inference_steps: 11\n  clip_skip: 2\n")
    config = config_of(
        "x", "--config", str(tmp_path / "a.yaml"), "--set", "generation.steps=12", "--set", "generation.cfg=4", "--cfg", "5"
    )
    generation = config.generation
    assert (generation.clip_skip, generation.num_inference_steps, generation.guidance_scale) == (2, 12, 5.0)
    assert generation.batch_size == AppConfig().generation.batch_size


def test_later_config_wins_and_model_preset_comes_first(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("generation: {num_inference_steps: 9}\n")
    config = config_of("x", "--model", "embedded", "--config", str(tmp_path / "b.yaml"))
    assert (config.generation.num_inference_steps, config.generation.guidance_scale) == (9, 5.0)
    assert config.model.model_id == "embedded"


def test_the_model_flag_wins_over_config_and_set(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("model: {model_id: of/file}\n")
    file = ["--config", str(tmp_path / "b.yaml")]
    assert config_of("x", *file).model.model_id == "of/file"
    for model in ("embedded", "of/flag"):
        assert config_of("x", "--config", "2gb", "--model", model).model.model_id == model
        assert config_of("x", *file, "--model", model, "--set", "model.id=of/set").model.model_id == model
    assert config_of("x", "--config", "2gb", "--model", "embedded").optimization.max_vram_gb == 2.0


@pytest.mark.parametrize("name", ["2gb", "4gb"])
def test_a_card_size_is_no_model(name: str) -> None:
    with pytest.raises(UserError, match=f"card size, not a model; use --config {name}") as caught:
        config_of("x", "--model", name)
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], False),
        (["--config", "4gb"], False),
        (["--config", "2gb"], True),
        (["--model", "embedded"], True),
        (["--set", "model.id=x/y"], True),
        (["--set", "model.vae=x/y"], False),
    ],
)
def test_whether_a_model_was_given(argv: list[str], given: bool) -> None:
    assert is_given(parse_arguments(["x", *argv]), "model.model_id") is given


def test_a_setting_of_a_file_is_given_by_any_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("model: {id: of/file}\n")
    assert is_given(parse_arguments(["x", "--config", str(tmp_path / "b.yaml")]), "model.model_id")


def test_folders_know_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = config_of("x", "--output", "~/pictures")
    assert config.paths.folder("outputs") == Path("/home/someone/pictures")
    assert config.paths.folder("lora") == Path("models/lora")


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("gpu", "auto", "device 'gpu' is not known"),
        ("cuda:x", "auto", "device 'cuda:x' is not known"),
        ("cuda0", "auto", "cuda:N"),
        ("auto", "fp8", "precision 'fp8' is not known; choose auto, fp16"),
    ],
)
def test_unknown_devices_and_precisions(device: str, precision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_machine(ModelConfig(device=device, precision=precision))
    check_machine(ModelConfig(device="cuda:1", precision="bf16"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--width", "abc"], "--width abc: expected a whole number"),
        (["-W", "1.5"], "--width 1.5: expected a whole number"),
        (["--cfg", "high"], "--cfg high: expected a number"),
        (["--precision", "fp8"], "--precision fp8: choose auto, fp16, bf16 or fp32"),
        (["--width"], "--width: its value is missing; write --width PX"),
        (["--negative", "--steps", "3"], "--negative-prompt: its value is missing; write --negative-prompt TEXT"),
        (["--negative", "--stpes", "3"], "its value is missing"),
        (["--grid=3"], "--grid takes no value"),
        (["--grdi"], "did you mean --grid?"),
        (["--grid", "-x"], "unknown argument '-x'"),
    ],
)
def test_wrong_arguments_are_told_in_our_words(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(["x", *argv])
    assert message in str(caught.value)
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("value", ["-blurry", "-", "- a, - b", "-3", "--a word", "-nope"])
@pytest.mark.parametrize("flag", ["--negative-prompt", "--negative_prompt", "--negative"])
def test_a_value_may_begin_with_a_dash(flag: str, value: str) -> None:
    typed = parse_arguments(["x", flag, value, "--steps", "3"])
    assert typed == {"prompt": "x", "generation.negative_prompt": value, "generation.num_inference_steps": 3}


def test_help_says_what_the_defaults_are_called_elsewhere() -> None:
    words = " ".join(help_text().split())
    assert "(default: dpm++_2m_karras, A1111's DPM++ 2M Karras)" in words
    assert "cuda:N" in words
    assert "near 0 keeps the picture" in words


def test_preset_sets_three_and_flags_win() -> None:
    generation = config_of("x", "--preset", "lcm", "--steps", "4").generation
    assert (generation.num_inference_steps, generation.guidance_scale, generation.scheduler) == (4, 1.5, "lcm")


@pytest.mark.parametrize("spelling", ["--cfg", "--cfg-scale", "--cfg_scale", "--guidance-scale", "--guidance_scale"])
def test_spellings_of_a_flag_are_one(spelling: str) -> None:
    assert config_of("x", spelling, "3.5").generation.guidance_scale == 3.5
    assert config_of("x", f"{spelling}=3.5").generation.guidance_scale == 3.5


def test_only_what_was_typed_comes_back() -> None:
    assert parse_arguments(["a cat", "-W", "640", "-n", "2"]) == {
        "prompt": "a cat",
        "generation.width": 640,
        "generation.num_images": 2,
    }
    assert parse_arguments(["--prompt", "a_b --c_d"]) == {"prompt": "a_b --c_d"}


def test_every_setting_has_a_reader_in_yaml(tmp_path: Path) -> None:
    """The resolved configuration, written as YAML, reads back equal."""
    config = AppConfig()
    config.generation.seed, config.model.revision, config.optimization.max_vram_gb = 7, "1e5", 3.5
    lines = []
    for section, values in config.to_dict().items():
        lines.append(f"{section}:")
        lines += [
            f"  {key}: {repr(value) if isinstance(value, str) else 'null' if value is None else str(value).lower()}"
            for key, value in values.items()
        ]
    (tmp_path / "all.yaml").write_text("\n".join(lines))
    assert load_config(tmp_path / "all.yaml").to_dict() == config.to_dict()
    assert len(setting_names()) == sum(len(values) for values in config.to_dict().values())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("-3", -3), ("0123", 123), ("12:30:45", "12:30:45"), ("no", "no"), ("on", "on"),
        ("0x1F", "0x1F"), ("1_000", "1_000"), ("true", True), ("~", None), ("2026-11-21", "2026-11-21"), ("'1'", "1"), ("", ""), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert (parse_scalar(text), type(parse_scalar(text))) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: &x 1\nb: *x", "anchors"),
        ("!!python/object/apply:os.system [ls]", "tag"),
        ("a: [" + "[" * 500, "deeper|node content"),
        ("[" * 40 + "]" * 40, "deeper than 32"),
        ("a: b: c", "mapping values"),
        ("a:\n  b: {{red|green}}", "x.yaml:2:7: a name cannot be a list or a table; put a text .* in quotes"),
        ("[1, 2]: 3", "a name cannot be a list"),
        ("a: " + "9" * 5000, "thousands of digits"),
        ("\tx: 1", "cannot start any token"),
    ],
)
def test_yaml_traps_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)
    assert "x.yaml:" in str(caught.value)


@pytest.mark.parametrize("data", [b"a: \xff", b"\x00", b"- 1\n- 2", b"model: 3", b"model:\n  nope: 1", b"a" * (2 << 20)])
def test_no_file_can_make_a_traceback(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(data)
    with pytest.raises(UserError):
        load_config(tmp_path / "x.yaml")
