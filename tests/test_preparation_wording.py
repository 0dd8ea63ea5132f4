"""What a caption becomes with trigger, template and quality words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.captions import clean
from src.errors import UserError
from src.preparation.settings import PrepareConfig, check
from src.preparation.wording import estimate_tokens, word_captions


@pytest.mark.parametrize(
    ("captions", "settings", "expected"),
    [
        ((), {}, ()),
        ((), {"trigger": "sks dog"}, ("a photo of sks dog",)),
        ((), {"trigger": "sks", "caption_template": "{trigger} person"}, ("sks person",)),
        ((), {"caption_template": "a dog"}, ("a dog",)),
        (("on a sofa",), {}, ("on a sofa",)),
        (("on a sofa",), {"trigger": "sks dog"}, ("sks dog, on a sofa",)),
        (("A photo of SKS Dog.",), {"trigger": "sks dog"}, ("A photo of SKS Dog.",)),
        (("sks doggy",), {"trigger": "sks dog"}, ("sks dog, sks doggy",)),
        (("a", "sks b"), {"trigger": "sks"}, ("sks, a", "sks b")),
        (("on a sofa",), {"trigger": "sks", "caption_template": "{caption}, {trigger} style"}, ("on a sofa, sks style",)),
        ((), {"trigger": "sks", "caption_template": "{trigger}, {caption}"}, ("sks",)),
        ((), {"caption_template": "{caption}"}, ()),
        (("{trigger} {x} \\1",), {"caption_template": "a {caption}"}, ("a {trigger} {x} \\1",)),
        (("dog",), {"caption_prefix": ("best quality", "dog"), "caption_suffix": ("4k",)}, ("best quality, dog, 4k",)),
        ((), {"caption_prefix": ("best quality",)}, ()),
        ((), {"caption_prefix": ("best quality",), "caption_template": "{caption}"}, ()),
        (("",), {"caption_prefix": ("best quality",)}, ()),
        (("",), {"trigger": "sks dog", "caption_prefix": ("best quality",)}, ("best quality, a photo of sks dog",)),
        (("", "a"), {"trigger": "sks"}, ("sks, a",)),
        (("a", "a"), {"trigger": "a"}, ("a",)),
    ],
)
def test_wording(captions, settings, expected):
    config = PrepareConfig(src="a", dst="b", **settings)
    check(config)
    assert word_captions(captions, config) == expected


@given(st.lists(st.text().map(clean).filter(bool), max_size=3), st.text().map(clean).filter(bool))
def test_every_caption_holds_the_trigger_once_more_at_most(captions, trigger):
    config = PrepareConfig(trigger=trigger)
    worded = word_captions(captions, config)
    assert worded
    assert all(trigger in caption or caption in captions for caption in worded)
    assert all(any(caption.endswith(own) for own in captions or [trigger]) for caption in worded)
    assert word_captions(worded, config) == worded  # a second time adds nothing


@pytest.mark.parametrize("template", ["{trigger}{", "{name}", "a {} b", "{{trigger}}", " "])
def test_templates_that_cannot_be_filled_are_refused(template):
    with pytest.raises(UserError, match="--caption-template"):
        check(PrepareConfig(src="a", dst="b", trigger="x", caption_template=template))


def test_a_template_with_a_trigger_needs_one():
    with pytest.raises(UserError, match="give --trigger"):
        check(PrepareConfig(src="a", dst="b", caption_template="my {trigger}"))


CLIP_LENGTHS = {  # by openai/clip-vit-large-patch14's tokenizer, without the two frame tokens
    "": 0,
    "a photo of a cat": 5,
    "a dog, asleep on a red sofa": 8,
    "masterpiece, best quality, 4k": 7,
    "it's 2024": 6,
    "a photograph of an astronaut riding a horse on mars, highly detailed": 13,
    "1girl, solo, long_hair, looking_at_viewer, blush, smile, open_mouth, school_uniform": 26,
    "A man in a blue hard hat and orange safety vest stands in an intersection while holding a flag.": 20,
    "un perro durmiendo sobre el sofá": 10,
    "кот на диване": 14,
    "ソファーの上の猫": 12,
}


@pytest.mark.parametrize("caption", CLIP_LENGTHS)
def test_tokens_are_about_as_many_as_clip_makes(caption):
    tokens = CLIP_LENGTHS[caption]
    assert abs(estimate_tokens(caption) - tokens) <= (0.1 if caption.isascii() else 0.2) * tokens
