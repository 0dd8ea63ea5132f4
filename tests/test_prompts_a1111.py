"""What A1111 reads in a prompt and we do not is named, and nothing else."""

from __future__ import annotations

import pytest

from src.prompts import unsupported_syntax


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a [cat:dog:0.5] runs", "[cat:dog:0.5]"),
        ("a [cat:10]", "[cat:10]"),
        ("a [cat::.5]", "[cat::.5]"),
        ("a [cat|dog]", "[cat|dog]"),
        ("[a:[b:0.2]:0.5]", "[b:0.2]"),
        ("a cat AND a dog", "'AND'"),
        ("a cat AND a [b|c]", "[b|c]"),
    ],
)
def test_schedules_and_combinations_are_named(text: str, named: str) -> None:
    assert named in unsupported_syntax(text)


@pytest.mark.parametrize(
    "text",
    [
        "a [cat]",
        "(cat:1.3)",
        "[(cat:1.3)]",
        r"\[cat:dog:0.5\]",
        "[{cat|dog}]",
        "a and b, ANDROID",
        "time 10:30",
        "<lora:a:1>",
        "",
    ],
)
def test_what_is_known_is_not_named(text: str) -> None:
    assert unsupported_syntax(text) is None


@pytest.mark.parametrize("piece", ["[", "[|", "|", ":1", "[:", "1"])
def test_looking_for_it_takes_linear_time(piece: str) -> None:
    unsupported_syntax("[" + piece * 100_000)
