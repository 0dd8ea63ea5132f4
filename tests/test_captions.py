"""Captions of every form in use, in every encoding people have; what is no UTF-8 is named before anything else happens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.captions import clean, find_captions, read_captions, repeats_of
from src.errors import ExitCode, UserError


def picture(folder, name="a.png"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def captions_of(folder, *pictures):
    found, _ = read_captions(folder, pictures)
    return [found[path] for path in pictures]


def refusal(folder, *pictures):
    with pytest.raises(UserError) as caught:
        read_captions(folder, pictures)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sidecar_beats_metadata_beats_folder_name(tmp_path):
    a, b, c = (picture(tmp_path, f"10_sks dog/{name}.png") for name in "abc")
    rows = [{"file_name": f"10_sks dog/{name}.png", "text": f"row {name}"} for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a.with_suffix(".txt").write_text("beside")
    assert captions_of(tmp_path, a, b, c) == [("beside",), ("row b",), ("sks dog",)]


def test_origins_say_which_file_a_caption_came_from(tmp_path):
    a, b = picture(tmp_path, "a.png"), picture(tmp_path, "3_cat/b.png")
    a.with_suffix(".caption").write_text("x")
    found = find_captions(tmp_path, [a, b])
    assert found.origins == {a: tmp_path / "a.caption"}
    assert any("3_cat" in note for note in found.notes)


def test_only_files_that_may_be_read_are_read(tmp_path):
    a = picture(tmp_path)
    a.with_suffix(".txt").write_text("secret")
    assert find_captions(tmp_path, [a], is_file=lambda path: False).texts == {a: ()}


def test_each_line_of_a_sidecar_is_a_caption(tmp_path):
    a = picture(tmp_path)
    a.with_suffix(".txt").write_text("a dog\r\n\r\n  the  dog \na dog\nasleep")
    found, notes = read_captions(tmp_path, [a])
    assert found[a] == ("a dog", "the dog", "asleep")
    assert any("several captions" in note for note in notes)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, ("a",)),
        ({"caption": "a"}, ("a",)),
        ({"captions": ["a", "b"]}, ("a", "b")),
        ({"text": "a", "captions": ["a", "b"]}, ("a", "b")),
        ({"text": ["a", "b"]}, ("a", "b")),
        ({"text": "a", "captions": []}, ("a",)),
        ({"text": None, "caption": "b"}, ("b",)),
        ({"text": ""}, ()),
        ({"label": 3}, ()),
    ],
)
def test_rows_of_metadata(tmp_path, row, expected):
    a = picture(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **row}) + "\n\n")
    assert captions_of(tmp_path, a) == [expected]


def test_several_rows_of_one_picture_are_several_captions(tmp_path):
    """As Flickr30k's tables have it."""
    a, b = picture(tmp_path, "a.png"), picture(tmp_path, "b.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"one, two"\nb.png,three\na.png,four\n')
    assert captions_of(tmp_path, a, b) == [("one, two", "four"), ("three",)]


def test_a_csv_may_hold_lists(tmp_path):
    a = picture(tmp_path)
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,captions\na.png,"[""one"", ""two""]"\n', encoding="utf-8")
    assert captions_of(tmp_path, a) == [("one", "two")]


def test_the_deeper_metadata_wins_and_names_are_relative_to_it(tmp_path):
    a, b = picture(tmp_path, "train/a.png"), picture(tmp_path, "b.png")
    rows = [
        {"file_name": "train/a.png", "text": "far"},
        {"file_name": "b.png", "text": "b"},
        {"file_name": "x.png", "text": "x"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train/metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "near"}))
    found, notes = read_captions(tmp_path, [a, b])
    assert (found[a], found[b]) == (("near",), ("b",))
    assert [note for note in notes if "not there: 1, first x.png" in note]


def test_metadata_of_windows_and_macos(tmp_path):
    a, b = picture(tmp_path, "sub/a.png"), picture(tmp_path, "Cafe\u0301.png")  # the accent apart, as macOS stores it
    rows = [{"file_name": "sub\\a.png", "text": "a"}, {"file_name": "Caf\u00e9.png", "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert captions_of(tmp_path, a, b) == [("a",), ("b",)]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a.png/../../b", "\0", "x" * 10_000])
def test_names_in_metadata_open_nothing(tmp_path, name):
    a = picture(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    assert captions_of(tmp_path, a) == [()]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{", "line 2 is no JSON object"),
        ("[1]", "line 2 is no JSON object"),
        ("[" * 100_000, "line 2 is no JSON object"),
        ('{"text": "x"}', "line 2 has no file_name"),
        ('{"file_name": 3, "text": "x"}', "line 2 has no file_name"),
        ('{"file_name": "a.png", "text": 5}', "line 2: text is neither a text nor a list"),
        ('{"file_name": "a.png", "captions": ["x", 5]}', "line 2: captions is neither"),
    ],
)
def test_damaged_metadata_is_refused_with_its_line(tmp_path, line, cause):
    a = picture(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    assert cause in refusal(tmp_path, a)


@pytest.mark.parametrize("folder", ["10_sks dog", "1_sks dog", "0_sks dog", "100_sks dog"])
def test_kohya_folders(tmp_path, folder):
    a = picture(tmp_path, f"{folder}/a.png")
    deep = picture(tmp_path, f"{folder}/deep/a.png")
    assert captions_of(tmp_path, a, deep) == [("sks dog",)] * 2
    assert repeats_of(tmp_path, a) == repeats_of(tmp_path, deep) == max(1, int(folder.split("_")[0]))


@pytest.mark.parametrize("folder", ["2024_holiday", "sks dog", "_x", "10_", "10"])
def test_other_folders_are_no_captions(tmp_path, folder):
    a = picture(tmp_path, f"{folder}/a.png")
    assert captions_of(tmp_path, a) == [()]
    assert repeats_of(tmp_path, a) == 1


def test_the_data_folder_itself_and_what_lies_above_it_do_not_count(tmp_path):
    root = tmp_path / "5_above" / "10_root"
    a = picture(root)
    assert captions_of(root, a) == [()]
    assert repeats_of(root, a) == 1


TEXTS = {  # encoding -> a caption that people write in it
    "utf-8": "Zürich, 猫, кот",
    "utf-8-sig": "Zürich, 猫, кот",
    "utf-16": "Zürich",
    "utf-16-le": "a dog",
    "utf-16-be": "a dog",
    "utf-32": "a dog",
    "latin-1": "Zürich",
    "cp1252": "“Zürich”",
    "mac_roman": "Zürich",
    "shift_jis": "ソファーの上の猫",
    "gbk": "沙发上的猫",
    "big5": "沙發上的貓",
    "euc_kr": "소파 위의 고양이",
    "koi8-r": "кот на диване",
    "cp1251": "кот на диване",
    "iso2022_jp": "ソファーの上の猫",
    "cp500": "a dog",  # EBCDIC
}


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("lead", ["", "a photo\n"])
def test_utf8_is_read_and_everything_else_is_refused_with_the_byte(tmp_path, encoding, lead):
    a = picture(tmp_path)
    text = TEXTS[encoding]
    data = (lead + text).encode(encoding)
    a.with_suffix(".txt").write_bytes(data)
    if encoding.startswith("utf-8"):
        assert captions_of(tmp_path, a) == [(*lead.split("\n")[:-1], text)]
        return
    message = refusal(tmp_path, a)
    assert "a.txt (byte " in message
    assert "UTF-8" in message
    offset = int(message.partition("(byte ")[2].split()[0])
    assert offset < len(data)
    if encoding in ("latin-1", "koi8-r", "shift_jis"):
        assert data[:offset].isascii()
        assert data[offset] > 127


def test_the_byte_is_counted_from_the_start_of_the_file(tmp_path):
    a = picture(tmp_path)
    a.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfab\xff")
    assert "byte 5 is not UTF-8" in refusal(tmp_path, a)


def test_all_bad_files_are_named_at_once(tmp_path):
    pictures = [picture(tmp_path, f"{number}.png") for number in range(3)]
    for path in pictures:
        path.with_suffix(".txt").write_bytes(b"caf\xe9")
    (tmp_path / "metadata.csv").write_bytes(b"\0")
    message = refusal(tmp_path, *pictures)
    assert all(name in message for name in ("0.txt", "1.txt", "2.txt", "metadata.csv"))


def test_thousands_of_bad_files_are_still_one_line(tmp_path):
    pictures = [picture(tmp_path, f"{number}.png") for number in range(100)]
    for path in pictures:
        path.with_suffix(".txt").write_bytes(b"\xff")
    assert "and 80 more" in refusal(tmp_path, *pictures)


def test_a_caption_file_that_is_no_caption_is_refused(tmp_path):
    a = picture(tmp_path)
    a.with_suffix(".txt").write_bytes(b"x" * 10_000_000)
    assert "more than 65,536 bytes" in refusal(tmp_path, a)


def test_an_empty_sidecar_says_nothing(tmp_path):
    a = picture(tmp_path)
    a.with_suffix(".txt").write_text("\ufeff \n\t\n", encoding="utf-8")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    assert captions_of(tmp_path, a) == [("x",)]


@given(st.text())
def test_clean_is_one_line_without_controls_and_stays_as_it_is(text):
    once = clean(text)
    assert clean(once) == once
    assert "\ufeff" not in once
    assert not any(sign < " " or "\x7f" <= sign < "\xa0" for sign in once)
    once.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\t dog \r\n on\u00a0a sofa ", "a dog on a sofa"),
        ("\ufeffa cat", "a cat"),
        ("a\0b\x1b[31mred", "ab[31mred"),
        ("abc\u202edef", "abcdef"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),  # a joiner within an emoji stays
        ("\ud800x", "x"),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


def test_a_sidecar_whose_ending_has_capitals_belongs_to_its_picture(tmp_path):
    a, b = picture(tmp_path, "IMG_1.JPG"), picture(tmp_path, "IMG_2.JPG")
    (tmp_path / "IMG_1.TXT").write_text("one")
    (tmp_path / "IMG_2.Caption").write_text("two")
    found = find_captions(tmp_path, [a, b])
    assert found.texts == {a: ("one",), b: ("two",)}
    assert found.origins[a].samefile(tmp_path / "IMG_1.TXT")
    assert found.origins[b].samefile(tmp_path / "IMG_2.Caption")


def test_an_empty_sidecar_is_none_where_that_is_asked_for(tmp_path):
    a = picture(tmp_path)
    a.with_suffix(".txt").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    assert read_captions(tmp_path, [a], empty_is_none=True)[0] == {a: ()}
    a.with_suffix(".caption").write_text("y")
    assert read_captions(tmp_path, [a], empty_is_none=True)[0] == {a: ("y",)}
    a.with_suffix(".txt").unlink()
    a.with_suffix(".caption").unlink()
    assert read_captions(tmp_path, [a], empty_is_none=True)[0] == {a: ("x",)}


def test_an_empty_sidecar_is_named_once(tmp_path):
    a, b = picture(tmp_path, "3_cat/a.png"), picture(tmp_path, "3_cat/a.jpg")
    a.with_suffix(".txt").write_text(" \n\ufeff\n", encoding="utf-8")
    found = find_captions(tmp_path, [a, b])
    assert found.empty == [a.with_suffix(".txt")]
    assert found.texts == {a: ("cat",), b: ("cat",)}
    assert found.notes[0] == "empty caption files, taken as none: 3_cat/a.txt; write a caption into them, or delete them"


def test_names_with_line_breaks_stay_on_one_line(tmp_path):
    a = picture(tmp_path, "a\nb.png")
    a.with_suffix(".txt").write_bytes(b"")
    assert "\n" not in read_captions(tmp_path, [a])[1][0]
    a.with_suffix(".txt").write_bytes(b"\xff")
    assert "b.txt (byte 0 is not UTF-8)" in refusal(tmp_path, a)
