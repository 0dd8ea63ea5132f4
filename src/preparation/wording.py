"""How the captions of the training are worded: trigger, template, quality words; and how long they are for CLIP."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from src.captions import clean
from src.preparation.settings import PrepareConfig

CLIP_TOKENS = 75  # of one window of CLIP's text encoder; what is longer needs a second one, or is cut off by other trainers
# CLIP splits a text into runs of letters, single digits and runs of signs before it looks for known pieces.
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_", re.IGNORECASE)
_LETTERS_A_TOKEN = 12  # longer words are seldom known as a whole
_TOKENS_A_SIGN = 1.3  # of letters beyond ASCII, most of which are known as bytes only


def word_captions(captions: Sequence[str], config: PrepareConfig) -> tuple[str, ...]:
    """The captions of one picture as they are trained; ``()`` if it has none and nothing stands for one.

    Without a caption the template is the caption, if its trigger is known. A template with ``{caption}`` is filled for every
    picture. Otherwise the trigger is put before a caption that does not hold it yet: "sks dog, asleep on a sofa". Prefixes
    and suffixes that a caption holds already are not repeated.
    """
    trigger, template = clean(config.trigger or ""), config.caption_template
    captions = list(filter(None, captions))  # a captioner may have found no words
    if "{caption}" in template:
        worded = [_filled(template, trigger, caption) for caption in captions or [""]]
    elif captions:
        worded = [_with_words([trigger], caption, []) for caption in captions]
    elif trigger or "{trigger}" not in template:
        worded = [_filled(template, trigger, "")]
    else:
        return ()
    worded = [_with_words(config.caption_prefix, caption, config.caption_suffix) for caption in worded if caption]
    return tuple(dict.fromkeys(worded))


def estimate_tokens(caption: str) -> int:
    """About how many tokens CLIP's tokenizer makes of a caption, without the two that frame it.

    Within a tenth for English, a fifth for Russian or Japanese (tested). Exact numbers would need the vocabulary.
    """
    tokens = 0
    for piece in _PIECES.findall(caption):
        plain = sum(sign.isascii() for sign in piece)
        tokens += -(-plain // _LETTERS_A_TOKEN) + math.ceil(_TOKENS_A_SIGN * (len(piece) - plain))
    return tokens


def _filled(template: str, trigger: str, caption: str) -> str:
    """The template with its words put in; without a caption its place goes, and the comma beside it."""
    if not caption:
        template = re.sub(r"\s*,\s*\{caption\}|\{caption\}(\s*,\s*)?", "", template)
    return clean(re.sub(r"\{(trigger|caption)\}", lambda found: trigger if found[1] == "trigger" else caption, template))


def _with_words(before: Sequence[str], caption: str, after: Sequence[str]) -> str:
    """``caption`` between the words that it does not hold yet, joined by commas."""
    missing_before = [clean(words) for words in before if not _holds(caption, clean(words))]
    missing_after = [clean(words) for words in after if not _holds(caption, clean(words))]
    return ", ".join([*missing_before, caption, *missing_after])


def _holds(caption: str, words: str) -> bool:
    """Whether the words stand in the caption, as whole words and in any case."""
    return not words or re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE) is not None
