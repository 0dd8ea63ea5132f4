"""The second phase: byte-level BPE as CLIP's, learnt from the captions (Sennrich et al. 2016; Radford et al. 2021).

A word begins as its bytes, the last one marked ``</w>``; the pair that is most frequent becomes one symbol, and so on.
What is left is a vocabulary in which each word of the grammar is one token, and any other text still has tokens.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from src.errors import usage_error
from src.scratch.phases import Work
from src.scratch.settings import ScratchSettings, TokenizerSettings
from src.terminal import Terminal

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MARK = "</w>"  # of the end of a word


def learn_tokenizer(work: Work, settings: ScratchSettings, terminal: Terminal) -> dict[str, float]:
    """Learn from the captions of training, and publish what `CLIPTokenizer` loads."""
    inputs, captions = work.inputs("tokenizer"), read_captions(work)
    merges = learn_merges(Counter(word for caption in captions for word in caption.split()), settings.tokenizer.merges)
    contents = tokenizer_files(merges, settings.tokenizer)
    words = {word for caption in captions for word in caption.split()}
    known = set(vocabulary(merges))
    figures = {"tokens": len(known), "words": len(words), "words_of_one_token": sum(f"{word}{MARK}" in known for word in words)}
    count = {word: len(tokens_of(word, merges)) for word in words}
    figures["longest"] = longest = max(sum(map(count.__getitem__, caption.split())) for caption in captions) + 2  # begin, end
    if longest > settings.tokenizer.length:
        raise usage_error(
            f"tokenizer.length {settings.tokenizer.length}: with {len(merges)} merges the longest caption has {longest} tokens"
        )
    work.publish("tokenizer", settings, contents, figures, inputs)
    terminal.say(f"tokenizer {figures['tokens']} tokens; {figures['words_of_one_token']} of {len(words)} words are one token")
    return figures


def read_captions(work: Work) -> list[str]:
    """The captions of training."""
    result = work.result("scenes")
    names = sorted(name for name in result.files if name.startswith("train") and name.endswith(".json"))
    return [entry["scene"]["caption"] for name in names for entry in json.loads(result.read(name))]


def learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """Up to ``count`` pairs of symbols in the order in which they are joined; of equally frequent ones the first by name."""
    symbols = {word: spelt(word) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in symbols.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = {word: joined(parts, best) for word, parts in symbols.items()}
    return merges


def spelt(word: str) -> list[str]:
    """A word as bytes, each written as a letter; the last one ends it."""
    letters = bytes_to_unicode()
    parts = [letters[byte] for byte in word.encode()]
    return [*parts[:-1], parts[-1] + MARK]


def tokens_of(word: str, merges: Iterable[tuple[str, str]]) -> list[str]:
    """What a word is cut into."""
    parts = spelt(word)
    for pair in merges:
        parts = joined(parts, pair)
    return parts


def joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with each occurrence of the pair as one."""
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def vocabulary(merges: Iterable[tuple[str, str]]) -> list[str]:
    """All tokens in the order of their numbers: bytes, bytes that end a word, what was merged, begin and end."""
    letters = list(bytes_to_unicode().values())
    return [*letters, *(letter + MARK for letter in letters), *("".join(pair) for pair in merges), BEGIN, END]


def tokenizer_files(merges: list[tuple[str, str]], settings: TokenizerSettings) -> dict[str, bytes]:
    """What is in the folder of a `CLIPTokenizer`."""
    numbers = {token: number for number, token in enumerate(vocabulary(merges))}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": settings.length, "do_lower_case": True, "errors": "replace",
        "bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END,
    }  # fmt: skip
    texts = (json.dumps(numbers, ensure_ascii=False), "\n".join(lines) + "\n", json.dumps(config, indent=2))
    return {name: text.encode() for name, text in zip(TOKENIZER_FILES, texts)}


def read_tokenizer(work: Work) -> CLIPTokenizer:
    """The published tokenizer."""
    return CLIPTokenizer.from_pretrained(work.result("tokenizer").folder)
