"""Settings: types, precedence, did-you-mean; YAML without its traps."""

from pathlib import Path

import pytest

from src.arguments import build_config, parse_arguments
from src.config import AppConfig, load_config, parse_assignment, set_value, setting_names
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
    (tmp_path / "b.yaml").write_text("generation: {width: 640}\n")
    config = config_of("x", "--model", "sdxl", "--config", str(tmp_path / "b.yaml"))
    assert (config.generation.width, config.generation.height) == (640, 1024)
    assert config.model.model_id == "stabilityai/stable-diffusion-xl-base-1.0"


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
