# SPDX-License-Identifier: Apache-2.0
"""The one arithmetic of gaps: which blocks of a request a decoder stage never holds.

A stage keeps some visual tokens of an image and drops the others. Which ones is not known before
the prefill runs, but how many is, and vLLM addresses KV cache by position: position p lies in
block p // block_size of the request. So the kept tokens move to the beginning and the end of the
image's positions, and the whole blocks in between are the gap: never allocated, never written.

            start          gap                     gap    start + length
    text  | k k k k k k k k|- - - - - - - - - - - |k k k| text
          |        an image of which k is kept           |

Only whole blocks can be left out, so tokens of up to two blocks more are kept than were asked
for of each image. They are real tokens, used, reported and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Gap(NamedTuple):
    """Blocks of a request that a stage does not hold, counted from the request's first."""

    first: int
    end: int
    """Exclusive; not above ``first`` where there is no gap."""


class Run(NamedTuple):
    """The positions of one image's visual tokens in a prompt."""

    start: int
    end: int
    """Exclusive."""


def gap_of(run: Run, keep: int, block_size: int, prompt: int) -> Gap | None:
    """The gap of one image in one stage; None where no whole block can be left out.

    Two blocks are never in a gap: the request's first, since vLLM takes a row of the block table
    that starts with the null block for padding; and that of the prompt's last token, whose row
    makes the first logits. Where an image ends the prompt, the last token that it keeps is in
    that row.

    Args:
        run: the image.
        keep: how many of its tokens the stage keeps, at least.
        block_size: tokens of a KV cache block.
        prompt: tokens of the prompt.
    """
    end = min(run.end, prompt - 1) // block_size
    behind = run.end - end * block_size  # tokens of the image behind the gap
    first = -(-(run.start + max(keep - behind, 0)) // block_size)
    gap = Gap(max(first, 1), end)
    return gap if gap.first < gap.end else None


def held_of(run: Run, keep: int, block_size: int, prompt: int) -> int:
    """Visual tokens of an image that a stage really holds: ``keep`` or some more."""
    gap = gap_of(run, keep, block_size, prompt)
    left_out = (gap.end - gap.first) * block_size if gap else 0
    return run.end - run.start - left_out


@dataclass(frozen=True)
class Plan:
    """What the scheduler must know of a request with a reduction inside the decoder."""

    runs: tuple[Run, ...]
    """Its images, ascending."""
    gaps: tuple[tuple[Gap, ...], ...]
    """Of every stage, ascending; none for stage 0."""
    prompt: int
    """Tokens of the prompt."""
    looks_at_question: bool
    """Whether a method looks at the text behind an image: then a prefill may not stop between the
    first image and the prompt's end."""

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        keep: Sequence[Sequence[int]],
        block_size: int,
        prompt: int,
        looks_at_question: bool,
    ) -> Plan:
        """The plan that keeps so many tokens.

        Args:
            runs: the images.
            keep: of every image, how many tokens every stage from 1 on keeps, at least.
            block_size: tokens of a KV cache block, the same in all these stages.
            prompt: tokens of the prompt.
            looks_at_question: as above.
        """
        stages = len(keep[0]) if keep else 0
        gaps = [
            tuple(
                gap
                for run, kept in zip(runs, keep, strict=True)
                if (gap := gap_of(run, kept[stage], block_size, prompt))
            )
            for stage in range(stages)
        ]
        return cls(tuple(runs), ((), *gaps), prompt, looks_at_question)

    def left_out(self, stage: int, first: int, end: int) -> int:
        """How many of the blocks from ``first`` up to ``end`` a stage does not hold."""
        return sum(max(0, min(end, gap.end) - max(first, gap.first)) for gap in self.gaps[stage])

    def may_resume_at(self, position: int) -> bool:
        """Whether a prefill may begin here, on a prefix that is known already.

        Not inside an image. Nor between two images where they are reduced by the question: the
        first one's tokens count as text to the other, and must be there again.
        """
        if self.looks_at_question:
            return not self.runs[0].start < position < self.runs[-1].end
        return not any(run.start < position < run.end for run in self.runs)

    def last_stop(self, start: int, end: int) -> int:
        """The last position from ``start`` to ``end`` at which the prefill may stop.

        ``start`` where there is none: then nothing can run now.
        """
        if start >= self.runs[-1].end:
            return end
        if not self.looks_at_question:
            cut = [run.start for run in self.runs if run.start < end < run.end]
            return max(start, cut[0]) if cut else end
        if end < self.prompt:
            return max(start, min(end, self.runs[0].start))
        # A request that starts anew after preemption has tokens behind its prompt. Its images must
        # see the same question as the first time, so it stops there once.
        return self.prompt
