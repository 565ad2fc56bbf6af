# SPDX-License-Identifier: Apache-2.0
"""The question of an image: the words of a prompt by which a method chooses among its tokens.

It is read from the prompt's token ids, whoever made them: it is the text behind an image, up to the
next image or the end; a video is like an image here. Images with nothing but white space between
them share what is behind the last. Where the image's turn ends with it, what its turn has before it
comes first (a text and then an image); a turn goes from one end-of-text token to the next. Special
tokens are left out, and of long texts all but the last :data:`LONGEST` tokens: what was asked last
counts.

A chat template's own words are text like any other: "ASSISTANT:" behind LLaVA's question, the names
of roles in Qwen's. So are earlier answers behind the image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

LONGEST = 256
"""Token ids of a question."""


def questions(
    prompt: Sequence[int], counts: Mapping[int, int], unspoken: Collection[int], tokenizer: Any
) -> dict[int, list[tuple[int, ...]]]:
    """The question of every image and video, as token ids; empty where a prompt has no text.

    Args:
        prompt: one token an image among it.
        counts: by the token of images, and of videos, how many there are. Those whose token vLLM
            has yet to find (its text was cut into others) get all of the prompt's text.
        unspoken: tokens that are no text.
        tokenizer: the model's.
    """

    def words(tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if token not in unspoken]

    def is_blank(tokens: Sequence[int]) -> bool:
        return not tokenizer.decode(words(tokens)).strip()

    places = [place for place, token in enumerate(prompt) if token in counts]
    edges = [-1, *places, len(prompt)]
    between = [prompt[start + 1 : end] for start, end in pairwise(edges)]
    groups: list[range] = []
    for number in range(len(places)):
        together = bool(groups) and is_blank(between[number])
        first = groups.pop().start if together else number
        groups.append(range(first, number + 1))
    found: dict[int, list[tuple[int, ...]]] = {token: [] for token in counts}
    for group in groups:
        before, behind = between[group.start], between[group.stop]
        if is_blank(behind[: _index(behind, tokenizer.eos_token_id)]):
            turn = _index(before[::-1], tokenizer.eos_token_id)
            behind = [*before[len(before) - turn :], *behind]
        for number in group:
            found[prompt[places[number]]].append(tuple(words(behind)[-LONGEST:]))
    everything = tuple(words(prompt)[-LONGEST:])
    return {
        token: [*found[token], *[everything] * count][:count] for token, count in counts.items()
    }


def _index(tokens: Sequence[int], wanted: int) -> int:
    """Where a token stands first; behind the last one if nowhere."""
    return tokens.index(wanted) if wanted in tokens else len(tokens)
