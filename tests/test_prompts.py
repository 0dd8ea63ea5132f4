"""The prompt grammar against truths worked out by hand from A1111's rules."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import ExitCode, UserError
from src.prompts import (
    MAX_OPEN_BRACKETS,
    Chunk,
    LoraTag,
    Segment,
    chunk_prompt,
    clean_prompt,
    expand_wildcards,
    extract_loras,
    parse_weights,
)

UP, DOWN = 1.1, 1 / 1.1
BREAK = Segment("", 1.0, is_break=True)

# Each row: the prompt, and its segments as (text, weight) or BREAK. The first six are the examples in A1111's documentation.
WEIGHTS = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", UP), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", UP)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", UP)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            *[("a ", 1), ("house", 1.573), (" ", UP), ("on", 1), (" a ", UP), ("hill", 0.55)],
            *[(", sun, ", UP), ("sky", 1.4641), (".", UP)],
        ],
    ),
    ("", [("", 1.0)]),
    ("()", [("", 1.0)]),
    ("((a))", [("a", 1.21)]),
    ("[a]", [("a", DOWN)]),
    ("[[a]]", [("a", DOWN * DOWN)]),
    ("([a])", [("a", 1.0)]),
    ("[unbalanced", [("unbalanced", DOWN)]),
    ("(a [b", [("a ", UP), ("b", 1.0)]),
    ("unbalanced)", [("unbalanced)", 1.0)]),
    ("a] b", [("a] b", 1.0)]),
    ("(a:1.3)", [("a", 1.3)]),
    ("(a:.5)", [("a", 0.5)]),
    ("(a:2)", [("a", 2.0)]),
    ("(a:2.)", [("a", 2.0)]),
    ("(a:+1.2)", [("a", 1.2)]),
    ("(a:-1)", [("a", -1.0)]),
    ("(a:0)", [("a", 0.0)]),
    ("(a: 1.3 )", [("a", 1.3)]),
    ("(a :1.3)", [("a ", 1.3)]),
    ("(a:1.3) b", [("a", 1.3), (" b", 1.0)]),
    ("(a:1.0) b", [("a b", 1.0)]),
    ("((a:1.3))", [("a", 1.43)]),
    ("((a:1.3) b:2)", [("a", 2.6), (" b", 2.0)]),
    ("(a, b:c:1.3)", [("a, b:c", 1.3)]),
    ("a:1.3)", [("a:1.3)", 1.0)]),
    ("[a:1.3]", [("a:1.3", DOWN)]),
    ("[from:to:0.5]", [("from:to:0.5", DOWN)]),
    ("[cow|horse]", [("cow|horse", DOWN)]),
    ("(a:1.2.3)", [("a:1.2.3", UP)]),
    ("(a:x)", [("a:x", UP)]),
    ("ratio 16:9", [("ratio 16:9", 1.0)]),
    ("(ratio 16:9)", [("ratio 16", 9.0)]),
    (r"\(a:1.3\)", [("(a:1.3)", 1.0)]),
    (r"(\(a\):1.3)", [("(a)", 1.3)]),
    (r"fate \(series\)", [("fate (series)", 1.0)]),
    (r"a\\b", [("a\\b", 1.0)]),
    (r"a\b", [("ab", 1.0)]),
    ("a\\", [("a", 1.0)]),
    (r"a(\:1.3)b", [("a", 1.0), ("b", 1.0)]),
    ("a BREAK b", [("a", 1.0), BREAK, ("b", 1.0)]),
    ("aBREAK b", [("aBREAK b", 1.0)]),
    ("break", [("break", 1.0)]),
    ("BREAK", [BREAK]),
    ("a BREAK BREAK b", [("a", 1.0), BREAK, BREAK, ("b", 1.0)]),
    ("a\nBREAK\nb", [("a", 1.0), BREAK, ("b", 1.0)]),
    ("(a) BREAK (b:0.9)", [("a", UP), BREAK, ("b", 0.9)]),
    ("(a BREAK b:1.5)", [("a", 1.5), BREAK, ("b", 1.5)]),
    ("(x:-1)BREAK", [("x", -1.0), BREAK]),
    ("日本 (猫:1.2) 😀", [("日本 ", 1.0), ("猫", 1.2), (" 😀", 1.0)]),
]


@pytest.mark.parametrize(("prompt", "expected"), WEIGHTS, ids=[row[0] or "empty" for row in WEIGHTS])
def test_weights(prompt: str, expected: list) -> None:
    segments = parse_weights(prompt)
    wanted = [item if isinstance(item, Segment) else Segment(*item) for item in expected]
    assert [(item.text, item.is_break) for item in segments] == [(item.text, item.is_break) for item in wanted]
    assert [item.weight for item in segments] == pytest.approx([item.weight for item in wanted], rel=1e-12)


@pytest.mark.parametrize("prompt", ["(" * (MAX_OPEN_BRACKETS + 1) + "a", "[(" * MAX_OPEN_BRACKETS, f"(a:{'9' * 400})"])
def test_absurd_weights_are_a_usage_error(prompt: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_weights(prompt)
    assert caught.value.exit_code == ExitCode.USAGE
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("piece", ["(a) [b:1.3], ", "a BREAK ", "\\(", ":1.5", ":   ", "9", " ", "a) "])
def test_a_hundred_kilobytes_take_linear_time(piece: str) -> None:
    parse_weights("(a:" + (piece * 100_000)[:100_000])  # minutes, were one of the patterns quadratic


@settings(max_examples=1000, deadline=None)
@given(st.text() | st.text(alphabet="()[]\\:.,19 aBREK"))
def test_any_text_parses_and_only_the_grammar_is_eaten(text: str) -> None:
    segments = parse_weights(text)
    assert all(math.isfinite(item.weight) for item in segments)
    joined = Counter("".join(item.text for item in segments))
    written = Counter(text)
    assert all(joined[char] <= written[char] for char in joined)
    if not set(text) & set("()[]\\") and "BREAK" not in text:
        assert segments == [Segment(text, 1.0)]


# --- chunks: a word is one token, its number; a comma is token 0 ---------------------------------------------------------

COMMA = 0


def tokenize(text: str) -> list[int]:
    return [COMMA if word == "," else int(word) for word in text.replace(",", " , ").split()]


def chunk_sizes(text: str, **options: int) -> list[int]:
    return [len(chunk.tokens) for chunk in chunk_prompt(parse_weights(text), tokenize, COMMA, **options)]


def words(count: int, *commas: int) -> str:
    """``count`` tokens 1, 2, 3, ... with a comma at these places, counted from 0."""
    return " ".join("," if place in commas else str(place + 1) for place in range(count))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", [0]),
        (words(1), [1]),
        (words(75), [75]),
        (words(76), [75, 1]),
        (words(150), [75, 75]),
        (words(151), [75, 75, 1]),
        (words(75, 74), [75]),
        (words(76, 74), [75, 1]),  # the comma is the last of 75: nothing behind it moves
        (words(76, 73), [74, 2]),  # the word behind the comma moves
        (words(75, 60), [75]),  # full, but nothing follows: nothing moves
        (words(76, 60), [61, 15]),
        (words(76, 55), [56, 20]),  # 20 from the end: just near enough
        (words(76, 54), [75, 1]),  # 21 from the end: too far
        (words(76, 57, 65), [66, 10]),  # the last comma counts
        (words(76, 75), [75, 1]),  # the 76th token is the comma itself: it opens the next window
        (words(76, 60, 75), [75, 1]),  # ... even with a comma near the end
        (words(77, 75), [75, 2]),
        (words(200), [75, 75, 50]),
        (words(200, 70, 140), [71, 70, 59]),
        (words(10) + " BREAK " + words(10), [10, 10]),
        (words(10) + " BREAK", [10]),
        ("BREAK " + words(10), [0, 10]),
        ("1 BREAK BREAK 2", [1, 0, 1]),
        ("BREAK", [0]),
        (words(75) + " BREAK " + words(2), [75, 2]),
        (words(80) + " BREAK " + words(2), [75, 5, 2]),
        (words(70, 69) + " BREAK " + words(76), [70, 75, 1]),  # a comma before the BREAK is forgotten
    ],
)
def test_where_a_long_prompt_is_cut(text: str, sizes: list[int]) -> None:
    assert chunk_sizes(text) == sizes


def test_no_comma_rule_without_backtrack_or_comma_token() -> None:
    assert chunk_sizes(words(76, 73), comma_backtrack=0) == [75, 1]
    assert [len(chunk.tokens) for chunk in chunk_prompt([Segment(words(76, 73), 1.0)], tokenize, None)] == [75, 1]


def test_a_comma_that_opens_a_window_is_forgotten() -> None:
    assert chunk_sizes(words(11, 5), window=5) == [5, 5, 1]  # as in A1111; it shows only where the window is short


def test_two_hundred_tokens_keep_their_order_and_weights() -> None:
    text = f"{words(100)} ({' '.join(map(str, range(101, 201)))}:1.5)"
    chunks = chunk_prompt(parse_weights(text), tokenize, COMMA)
    assert [token for chunk in chunks for token in chunk.tokens] == list(range(1, 201))
    assert [weight for chunk in chunks for weight in chunk.weights] == [1.0] * 100 + [1.5] * 100


def test_the_comma_rule_moves_weights_with_their_tokens() -> None:
    chunks = chunk_prompt([Segment(words(74, 72), 1.0), Segment("900 901", 2.0)], tokenize, COMMA)
    assert chunks[1] == Chunk((74, 900, 901), (1.0, 2.0, 2.0))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 1.1, 0.5])), max_size=300),
    st.integers(1, 80),
    st.integers(0, 30),
)
def test_no_token_is_ever_lost(tokens: list[tuple[int, float]], window: int, backtrack: int) -> None:
    segments = [Segment(str(token), weight) for token, weight in tokens]
    chunks = chunk_prompt(segments, tokenize, COMMA, window=window, comma_backtrack=backtrack)
    assert [pair for chunk in chunks for pair in zip(chunk.tokens, chunk.weights)] == tokens
    assert chunks
    assert all(len(chunk.tokens) <= window for chunk in chunks)


# --- LoRA tags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "tags"),
    [
        ("a cat", "a cat", []),
        ("a cat <lora:ink:0.8>", "a cat ", [("ink", 0.8)]),
        ("<lora:ink>a", "a", [("ink", 1.0)]),
        ("<lora:a:1><lora:b:-0.5> x", " x", [("a", 1.0), ("b", -0.5)]),
        ("<lora: my style : .5 >", "", [("my style", 0.5)]),
        ("<LoRA:ink:1>", "", [("ink", 1.0)]),
        ("<lora:v1.5-ink_(2):1>", "", [("v1.5-ink_(2)", 1.0)]),
        ("<hypernet:x:1> a < b", "<hypernet:x:1> a < b", []),
    ],
)
def test_lora_tags(prompt: str, text: str, tags: list[tuple[str, float]]) -> None:
    assert extract_loras(prompt) == (text, tuple(LoraTag(*tag) for tag in tags))


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("<lora:>", ExitCode.USAGE),
        ("<lora::0.5>", ExitCode.USAGE),
        ("<lora:a:>", ExitCode.USAGE),
        ("<lora:a:b>", ExitCode.USAGE),
        ("<lora:a:nan>", ExitCode.USAGE),
        ("<lora:a:1e999>", ExitCode.USAGE),
        ("<lora:a:0.5:0.6>", ExitCode.USAGE),
        ("<lora:a:te=0.5>", ExitCode.USAGE),
        ("<lora:a:0.5", ExitCode.USAGE),
        ("<lora:a <lora:b:1>", ExitCode.USAGE),
        ("<lora:../../x:1>", ExitCode.REFUSED),
        ("<lora:/etc/passwd:1>", ExitCode.REFUSED),
        ("<lora:..:1>", ExitCode.REFUSED),
        ("<lora:a\\b:1>", ExitCode.REFUSED),
        ("<lora:a\x1b[31m:1>", ExitCode.REFUSED),
    ],
)
def test_malformed_lora_tags(prompt: str, code: ExitCode) -> None:
    with pytest.raises(UserError) as caught:
        extract_loras(prompt)
    assert caught.value.exit_code == code
    assert str(caught.value).isprintable()


# --- wildcards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "wildcards"
    (root / "animals").mkdir(parents=True)
    (root / "colour.txt").write_text("# colours\n\nred\n  blue  \r\n", encoding="utf-8")
    (root / "animals" / "cat.txt").write_text("\ufeff{big|small} __colour__ cat\n", encoding="utf-8")
    (root / "my_style.txt").write_text("墨絵\n", encoding="utf-8")
    (root / "self.txt").write_text("x __self__\n", encoding="utf-8")
    (root / "twice.txt").write_text("__twice__ __twice__\nend\n", encoding="utf-8")
    (root / "latin.txt").write_bytes("rouge\nvert fonc\xe9\n".encode("latin-1"))
    (root / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "secret.txt").write_text("secret\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("prompt", "possible"),
    [
        ("a {red|blue} ball", {"a red ball", "a blue ball"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{a|}", {"a", ""}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("__colour__ car", {"red car", "blue car"}),
        ("__animals/cat__", {"big red cat", "big blue cat", "small red cat", "small blue cat"}),
        ("{__colour__|green}", {"red", "blue", "green"}),
        ("__my_style__", {"墨絵"}),
    ],
)
def test_every_option_is_drawn_and_no_other(prompt: str, possible: set[str], folder: Path) -> None:
    assert {expand_wildcards(prompt, seed, folder) for seed in range(200)} == possible


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("plain {text} | here", "plain {text} | here"),
        ("{", "{"),
        ("{a|b", "{a|b"),
        ("a|b}", "a|b}"),
        ("{a|{b}", "{a|{b}"),
        ("{{x}}", "{{x}}"),
        (r"\{a|b\}", "{a|b}"),
        (r"{a\|b}", "{a|b}"),
        (r"\__colour__", "__colour__"),
        (r"fate \(series\) \\ end\ ".strip(), r"fate \(series\) \\ end" + "\\"),
        ("______", "______"),
        ("__ x __", "__ x __"),
        ("snake_case __", "snake_case __"),
        ("(a:1.2) <lora:x:1>", "(a:1.2) <lora:x:1>"),
    ],
)
def test_what_is_no_wildcard_stays(prompt: str, text: str, folder: Path) -> None:
    assert expand_wildcards(prompt, 0, folder) == text


def test_an_escaped_brace_in_an_option_is_expanded_once(folder: Path) -> None:
    assert {expand_wildcards(r"{\{a\|b\}|\{a\|b\}}", seed, folder) for seed in range(9)} == {"{a|b}"}


def test_the_draw_is_pythons_random_with_the_seed(folder: Path) -> None:
    options = [str(number) for number in range(1000)]
    for seed in (0, 1, 2**32 - 1):
        assert expand_wildcards("{" + "|".join(options) + "}", seed, folder) == random.Random(seed).choice(options)


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        ("__color__", ExitCode.NOT_FOUND, "did you mean __colour__?"),
        ("__animals/cart__", ExitCode.NOT_FOUND, "did you mean __animals/cat__?"),
        ("__zzz__", ExitCode.NOT_FOUND, "zzz.txt"),
        ("__latin__", ExitCode.REFUSED, "line 2 is not UTF-8 (byte 0xe9)"),
        ("__empty__", ExitCode.REFUSED, "holds no options"),
        ("__../secret__", ExitCode.REFUSED, "../secret"),
        ("__animals/../../secret__", ExitCode.REFUSED, ".."),
        ("__/etc/passwd__", ExitCode.REFUSED, "/etc/passwd"),
        (r"__..\secret__", ExitCode.REFUSED, "secret"),
        ("__C:/secret__", ExitCode.REFUSED, "C:/secret"),
        ("__self__", ExitCode.USAGE, "names itself"),
        ("__twice__ " * 1000, ExitCode.USAGE, "names itself"),
        ("{a|b}" * 1001, ExitCode.USAGE, "over 1000 wildcards"),
    ],
)
def test_wildcards_that_cannot_be_replaced(prompt: str, code: ExitCode, words: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        expand_wildcards(prompt, 0, folder)
    assert caught.value.exit_code == code
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_wildcard_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"put hat\.txt") as caught:
        expand_wildcards("__hat__", 0, tmp_path / "nowhere")
    assert caught.value.exit_code == ExitCode.NOT_FOUND


def test_a_hundred_kilobytes_of_braces_take_linear_time(tmp_path: Path) -> None:
    assert expand_wildcards("{" * 100_000, 0, tmp_path) == "{" * 100_000
    assert expand_wildcards("_" * 100_000, 0, tmp_path) == "_" * 100_000


# --- cleaning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a cat", "a cat"),
        ("a\r\nb\tc\u2028d", "a b c d"),
        ("\x1b[31mred\x1b[0m\x07\x00", "[31mred[0m"),
        ("a\x9bb\x7f", "ab"),
        ("x\udce9y", "x\ufffdy"),
        ("\ud83d\ude00", "😀"),
        ("👩\u200d🚀 é", "👩\u200d🚀 é"),
        ("a\u202egnp.exe", "agnp.exe"),
        ("\ufeffa", "\ufeffa"),
    ],
)
def test_clean_prompt(text: str, clean: str) -> None:
    assert clean_prompt(text) == clean


@settings(max_examples=1000, deadline=None)
@given(st.text(st.characters(blacklist_categories=())))
def test_clean_text_can_always_be_printed_and_stored(text: str) -> None:
    clean = clean_prompt(text)
    clean.encode("utf-8")
    assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in clean)
    assert clean_prompt(clean) == clean
