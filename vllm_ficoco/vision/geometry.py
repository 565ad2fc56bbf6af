# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint's configuration a reduction depends on, and which ones are supported."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from vllm_ficoco import schedule
from vllm_ficoco.methods import METHODS
from vllm_ficoco.methods.paradigm import NEEDS, Method, Need
from vllm_ficoco.schedule import Stage
from vllm_ficoco.settings import Reduction, SettingsError, declared
from vllm_ficoco.vision.layout import Layout, Window

STAGES_KEY = "reduction_stages"
"""Of a model's configuration: see :func:`decoder_stages`."""

GRAPHS_KEY = "reduction_graphs"
"""Of a model's configuration: see :func:`graphed`."""

PRUNED_KEY = "reduction_left_to_vllm"
"""Of a model's configuration: vLLM prunes videos itself (``--video-pruning-rate``), and sends
positions its own way, of images too."""

NO_VIDEOS = "the videos of this model stay whole"
"""In the words of a refusal."""

_BY_FRAME = "which must be known before it is seen: text stands between its frames"


class UnsupportedModel(ValueError):
    """A model whose visual tokens cannot be reduced; the message says why."""


class PartPlan(NamedTuple):
    """What the tower does with one of its inputs: an image, its thumbnail, one of its tiles, or a
    frame of a video."""

    part: int
    """Which one of the layout's."""
    window: Window
    """What of its grid may stay."""
    keep: int
    """Tokens that are left of it, above 0."""
    stages: tuple[Stage, ...]
    """Where the others leave; none where nothing does."""


class Geometry(NamedTuple):
    """A model as a reduction sees it: the tower's grid and layers, the decoder's stages."""

    grid: tuple[int, int]
    """Rows and columns of tokens that the tower makes of each of its inputs; (0, 0) where every
    image has a grid of its own (Qwen-VL)."""
    layers: int
    """Layers of the tower that run: up to the one whose output LLaVA takes."""
    has_cls: bool
    decoder_layers: int = 1
    starts: tuple[int, ...] = ()
    """First layer of every stage of the decoder at which tokens can leave."""
    by_image: bool = False
    """Whether an image's layout depends on its size (tiles)."""
    offers: frozenset[Need] = frozenset({"layers", "attention"})
    """What methods can have of the model."""
    deepstack: int = 0
    """Levels of visual tokens that are added behind the decoder's first layers (Qwen3-VL)."""
    videos: Literal["whole", "reduced", "by_frame"] = "whole"
    """Whether videos can be reduced; ``by_frame``: text stands between their frames, so what each
    of them keeps must be known before it is seen (Qwen3-VL)."""
    unsupported: str = ""
    """Why nothing can be reduced; empty where something can. Nothing else then holds."""

    @classmethod
    def none(cls, reason: str) -> Geometry:
        """That of a model whose visual tokens cannot be reduced."""
        return cls((0, 0), 0, False, unsupported=reason)

    @property
    def tokens(self) -> int:
        """Visual tokens that the tower makes of one of its inputs; in LLaVA-1.5, of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def layout(self) -> Layout:
        """That of every image, where it is always the same.

        Raises:
            ValueError: it depends on the image.
        """
        if self.by_image:
            raise ValueError("the layout depends on the image")
        return Layout(self.grid)

    @property
    def is_native(self) -> bool:
        """Whether every image has a grid of its own."""
        return self.by_image and self.grid == (0, 0)

    def images_at_once(self, encoder_tokens: int) -> int:
        """How many images or tiles a step may put through the tower, by what vLLM lets it do.

        Of a model at native resolution: how many tokens.
        """
        return max(1, encoder_tokens // max(self.tokens, 1))

    def lacks(self, method: Method, video: bool = False) -> str:
        """What the method needs and the model does not offer of images, or of videos, in words;
        empty where nothing."""
        needs = method.needs - self.offers - ({"frames"} if video else set())
        missing = [words for need, words in NEEDS.items() if need in needs]
        return " and ".join(missing)

    def refuses(self, method: Method, video: bool = False) -> str:
        """Why the model cannot reduce images, or videos, by the method; empty where it can."""
        if method.for_videos_alone and not video:
            return f"{method.name} compares the frames of a video, and this is an image"
        if missing := self.lacks(method, video):
            return f"{method.name} needs {missing}, which this model does not offer"
        if not video:
            return ""
        if self.videos == "by_frame" and method.on_frames(method.options()) == "seen":
            return f"{method.name} shares the budget out by what it sees in the frames, {_BY_FRAME}"
        if self.videos == "by_frame" and method.decoder is not None:
            return f"{method.name} reduces inside the decoder, and text stands between the frames"
        if self.place_of(method, video) in ("tower", "input"):
            return f"{method.name} reduces in the tower or before it, and videos behind it alone"
        return ""

    def methods(self, video: bool = False) -> list[str]:
        """The names of those by which images, or videos, can be reduced, stages provided."""
        if self.unsupported or (video and self.videos == "whole"):
            return []
        return [name for name, method in METHODS.items() if not self.refuses(method, video)]

    def check_method(
        self, reduction: Reduction, field: str = "budget", video: bool = False
    ) -> None:
        """Whether this model can reduce by the method, whatever the image or video.

        Args:
            reduction: the settings.
            field: where their budget stood, for messages.
            video: it is a video.

        Raises:
            SettingsError: it lacks something for it, or has too few decoder stages.
        """
        if video and self.videos == "whole":
            raise SettingsError(field, reduction.budget, "left out for a video: " + NO_VIDEOS)
        if reason := self.refuses(reduction.spec, video):
            able = ", ".join(self.methods(video))
            raise SettingsError(
                _beside(field, "method"), reduction.method, f"one of {able}: {reason}"
            )
        unique = reduction.options.get("frames") == "unique"
        if unique and (not video or self.videos == "by_frame"):
            why = f"in this model, {_BY_FRAME}" if video else "for an image, which has no frames"
            raise SettingsError(
                _beside(field, "options.frames"), "unique", f"left out or 'even' {why}"
            )
        self.decoder_stages(reduction, field)

    def place_of(self, method: Method, video: bool = False) -> str:
        """Where the method reduces before the decoder, see :attr:`Method.place`."""
        at_output = method.at_output and (video or "layers" not in self.offers)
        return "output" if at_output else method.place

    @property
    def spans(self) -> list[int]:
        """Layers of every stage of the decoder, those before the first included."""
        return schedule.spans(self.starts, self.decoder_layers)

    def decoder_stages(self, reduction: Reduction, field: str = "budget") -> tuple[int, ...]:
        """At which stages of the decoder, counted from 1, tokens of an image leave.

        Raises:
            SettingsError: the method needs more stages than the server has.
        """
        part = reduction.spec.decoder
        if part is None:
            return ()
        wanted = part.layers[: part.least_stages]
        if len(self.starts) < len(wanted):
            needed: list[int] = []
            for layer in wanted:
                as_deep = schedule.same_depth(layer, 32, self.decoder_layers)
                # Visual tokens of the tower's levels come in before the first stage.
                first = max(1, self.deepstack)
                needed.append(max(as_deep, needed[-1] + 1 if needed else first))
            raise SettingsError(
                _beside(field, "method"),
                reduction.method,
                "left out here: it reduces inside the decoder, for which the server must be "
                f"started with stages, such as --reduction-stages {','.join(map(str, needed))}",
            )
        if part.every_stage:
            return tuple(range(1, 1 + len(self.starts)))
        return schedule.nearest_stages(self.starts, self.decoder_layers, wanted, 32)

    def held(
        self, reduction: Reduction | None, field: str = "budget", layout: Layout | None = None
    ) -> list[int]:
        """Visual tokens of an image or video in every stage of the decoder, and before the first.

        Stages hold whole KV blocks, so it can become some more inside the decoder
        (:func:`vllm_ficoco.engine.gaps.held_of`).

        Args:
            reduction: its settings.
            field: where they stood, for messages.
            layout: its own; by default the one that all images have.

        Raises:
            SettingsError: the method cannot reach the budget, or not with these stages.
        """
        layout = layout or self.layout
        count, tokens = 1 + len(self.starts), layout.tokens
        active = reduction.for_tokens(layout.sent) if reduction else None
        if active is None:
            return [tokens] * count
        self.check_method(active, field, layout.is_video)
        part, budget = active.spec.decoder, active.budget or 0
        if part is None:
            return [tokens if layout.original else budget] * count
        if (option := part.on_one_grid) and (layout.is_tiled or layout.is_video):
            value = active.options[option]
            if value != getattr(active.spec.options(), option):
                raise SettingsError(
                    _beside(field, f"options.{option}"),
                    value,
                    f"left out for {'a video' if layout.is_video else 'an image in tiles'}, whose "
                    "tokens lie on no common grid",
                )
        stages = self.decoder_stages(active, field)
        least = int(active.spec.place != "nowhere")  # of an image, something enters the decoder
        if least:
            stages = (0, *stages)
        given = active.options.get("tokens")
        if given is not None and (len(given) != len(stages) or given[0] < least):
            raise SettingsError(
                _beside(field, "options.tokens"),
                given,
                f"{len(stages)} numbers, one for each place where {active.method} reduces here"
                + (", the first above 0" if least else ""),
            )

        def kept(first: int) -> list[int]:
            """In every stage, where the first place of reduction keeps ``first``."""
            at_places = given or part.shares(tokens, max(first, least), len(stages))
            by_stage = dict(zip(stages, at_places, strict=True))
            left, held = tokens, []
            for stage in range(count):
                left = min(left, by_stage.get(stage, left))
                held.append(left)
            return held

        if given is not None:
            return kept(0)
        try:
            return schedule.within_average(budget, self.spans, tokens, kept)
        except ValueError as error:
            raise SettingsError(field, active.budget, str(error)) from None

    def parts(
        self, reduction: Reduction, field: str = "budget", layout: Layout | None = None
    ) -> list[PartPlan]:
        """What stays of every part of an image or video, and where the rest leaves in the tower.

        Empty where everything enters the decoder. A part of which nothing stays is left out. Where
        the device alone sees which frames keep how much (:meth:`Method.on_frames`), frames count by
        rank, or only their sum holds.

        Raises:
            SettingsError: the method cannot reach the budget in this tower, or as :meth:`held`.
        """
        return [*_parts(self, reduction, field, layout or self.layout)]

    def _smallest(self, reduction: Reduction, below: int, layout: Layout) -> int:
        """What an image needs: the smallest budget that can be kept; where none is given, the
        smallest number of tokens that can enter the decoder.

        Args:
            reduction: its settings, which cannot be followed.
            below: how many tokens would enter the decoder.
            layout: the image's.
        """

        def can_keep(count: int) -> bool:
            try:
                _plan(self, layout, reduction, count)
            except ValueError:
                return False
            return True

        counts = range(below + 1, layout.tokens)
        if layout.is_video:  # can be long, and with more every method can what it can with less
            count = below + 1 + bisect_left(counts, True, key=can_keep)
        else:
            count = next(filter(can_keep, counts), layout.tokens)
        if reduction.budget is None or reduction.spec.decoder is None:
            return count

        def entering(budget: int) -> int:
            of_more = reduction.model_copy(update={"budget": budget})
            return self.held(of_more, layout=layout)[0]

        budgets = range(reduction.budget + 1, layout.tokens)
        fitting = budgets[bisect_left(budgets, count, key=entering) :]
        return next((budget for budget in fitting if can_keep(entering(budget))), layout.tokens)

    def stages(
        self, reduction: Reduction, field: str = "budget", layout: Layout | None = None
    ) -> list[Stage]:
        """Where tokens leave in this tower, of the image or its thumbnail; empty where none do.

        Raises:
            SettingsError: as :meth:`parts`.
        """
        return [*next((p.stages for p in self.parts(reduction, field, layout)), ())]

    def kept(
        self, reduction: Reduction | None, field: str = "budget", layout: Layout | None = None
    ) -> int:
        """Visual tokens that enter the decoder: the placeholders and the rows the model returns.

        Raises:
            SettingsError: as :meth:`parts`.
        """
        layout = layout or self.layout
        return layout.tokens if reduction is None else _kept(self, reduction, field, layout)

    def newlines_kept(self, reduction: Reduction, layout: Layout) -> int:
        """Newline tokens of a reduced image that enter the decoder.

        With ``newlines: none`` they leave before any patch does: some stay only where a budget is
        larger than the number of patches.
        """
        return _newlines(reduction, layout, self.held(reduction, layout=layout)[0])


@lru_cache(maxsize=4096)
def _kept(geometry: Geometry, reduction: Reduction, field: str, layout: Layout) -> int:
    """As :meth:`Geometry.kept`, which a request asks half a dozen times."""
    plans = _parts(geometry, reduction, field, layout)
    if not plans:
        return layout.tokens
    return sum(plan.keep for plan in plans) + geometry.newlines_kept(reduction, layout)


@lru_cache(maxsize=4096)
def _parts(
    geometry: Geometry, reduction: Reduction, field: str, layout: Layout
) -> Sequence[PartPlan]:
    """As :meth:`Geometry.parts`."""
    active = reduction.for_tokens(layout.sent)
    if active is None:
        return []
    into_decoder = geometry.held(active, field, layout)[0]
    if into_decoder >= layout.tokens or active.spec.place == "input":
        return []
    if active.keeps_newlines and not layout.is_tiled and not layout.closed:
        raise SettingsError(
            _beside(field, "options.newlines"),
            "all",
            f"left out or 'none': {layout.kind}s have no newline tokens in this model",
        )
    try:
        return _plan(geometry, layout, active, into_decoder)
    except ValueError as error:
        allowed, value = str(error), active.budget
        if layout.is_tiled or layout.is_video:  # not what a part needs: what all of it needs
            smallest = geometry._smallest(active, into_decoder, layout)
            article = "a" if layout.is_video else "an"
            allowed = (
                f"at least {smallest} for {article} {layout.kind} of {layout.tokens} visual tokens"
            )
        if active.budget is None:
            field, value = _beside(field, "options.tokens"), active.options["tokens"]
            allowed = f"numbers of which the first is {allowed}"
        raise SettingsError(field, value, allowed) from None


def _newlines(reduction: Reduction, layout: Layout, count: int) -> int:
    if reduction.keeps_newlines or layout.closed:
        return layout.newlines
    return max(0, count - sum(window.tokens for window in layout.parts))


@lru_cache(maxsize=4096)
def _plan(geometry: Geometry, layout: Layout, reduction: Reduction, count: int) -> list[PartPlan]:
    """The parts of an image or video of which ``count`` tokens enter the decoder.

    Raises:
        ValueError: the method cannot do that; says what one part would need.
    """
    patches = count - _newlines(reduction, layout, count)
    if patches < 1:
        raise ValueError("more than the newlines")
    windows, across = layout.parts, reduction.spec.across
    sizes = [window.tokens for window in windows]
    if across is not None and layout.is_tiled:
        # Which tile keeps how much is seen on the device; here, how much the tiles keep together.
        whole = across.thumbnail(patches, sizes[0], sum(sizes[1:]), reduction.parsed_options())
        shares = [whole, *schedule.largest_remainder(patches - whole, sizes[1:])]
    elif layout.is_video:
        shares = _of_frames(reduction, layout, patches)
    else:
        shares = schedule.largest_remainder(patches, sizes)
    plans = []
    for part, (window, keep) in enumerate(zip(windows, shares, strict=True)):
        if keep:
            # Inside the tower padding is like any token: the redundant leave first.
            place = geometry.place_of(reduction.spec, layout.is_video)
            had = geometry.tokens if place == "tower" else window.tokens
            window = windows[0] if place == "tower" else window
            stages = []
            if keep < had and place != reduction.spec.place:
                stages = schedule.at_output(keep, geometry.layers)
            elif keep < had:
                options = reduction.parsed_options()
                stages = reduction.spec.schedule(had, keep, geometry.layers, options)
            plans.append(PartPlan(part, window, keep, tuple(stages)))
    return plans


def _of_frames(reduction: Reduction, layout: Layout, patches: int) -> list[int]:
    """What stays of every frame of a video; where the device alone sees of which how much, by rank.

    Raises:
        ValueError: the method cannot do that.
    """
    frames, each = layout.frames, layout.grid[0] * layout.grid[1]
    across = reduction.spec.across_frames
    if across is not None:
        return across.shares(patches, frames, each, reduction.parsed_options())
    if reduction.options.get("frames") == "unique":
        return schedule.by_rank(patches, frames, each)
    return schedule.evenly(patches, frames)


def _beside(field: str, name: str) -> str:
    """The path of another part of the settings, given that of their budget."""
    beside = field == "budget" or field.endswith(".budget")
    return field.removesuffix("budget") + name if beside else field


_LAYERS: frozenset[Need] = frozenset({"layers", "attention"})
_NATIVE: frozenset[Need] = frozenset({"scaling", "attention"})

FAMILIES: dict[str, frozenset[Need]] = {
    "llava": _LAYERS,
    "llava_next": _LAYERS | {"scaling"},
    "llava_onevision": _LAYERS | {"scaling"},
    "llava_next_video": frozenset({"attention"}),  # videos alone: behind the tower
    "qwen2_vl": _NATIVE,
    "qwen2_5_vl": _NATIVE,
    "qwen3_vl": _NATIVE,
    "qwen3_vl_moe": _NATIVE,
}
"""``model_type`` of the models that can be reduced, and what each offers to methods."""

VIDEOS: dict[str, Literal["reduced", "by_frame"]] = {
    "llava_onevision": "reduced",
    "llava_next_video": "reduced",
    "qwen2_vl": "reduced",
    "qwen2_5_vl": "reduced",
    "qwen3_vl": "by_frame",
    "qwen3_vl_moe": "by_frame",
}
"""Of those whose videos can be, see :attr:`Geometry.videos`."""


def geometry_of(config: Any) -> Geometry:
    """The geometry of a Hugging Face configuration of one of :data:`FAMILIES`.

    Raises:
        UnsupportedModel: there is no way to reduce for this configuration.
    """
    vision, family = getattr(config, "vision_config", None), getattr(config, "model_type", None)
    offers = FAMILIES.get(family or "")
    if offers is None or vision is None:
        raise UnsupportedModel(
            f"visual tokens can be reduced for {', '.join(FAMILIES)} models, not for {family!r}"
        )
    if getattr(config, PRUNED_KEY, False):
        raise UnsupportedModel(
            "with --video-pruning-rate vLLM prunes every video of a server itself"
        )
    geometry = _llava(config) if str(family).startswith("llava") else _native(vision)
    return geometry._replace(
        decoder_layers=config.text_config.num_hidden_layers,
        starts=decoder_stages(config),
        # Of LLaVA-NeXT-Video there are no images.
        by_image="scaling" in offers or family == "llava_next_video",
        offers=offers,
        videos=VIDEOS.get(family or "", "whole"),
    )


def _native(vision: Any) -> Geometry:
    """Of a tower that takes images as they come and merges its patches into tokens (Qwen-VL)."""
    return Geometry((0, 0), vision.depth, False, deepstack=_levels(vision))


def _levels(vision: Any) -> int:
    """How many of the decoder's first layers take in visual tokens of their own (Qwen3-VL)."""
    return len(getattr(vision, "deepstack_visual_indexes", ()))


def _llava(config: Any) -> Geometry:
    """Of a CLIP or SigLIP tower.

    Raises:
        UnsupportedModel: it is another one, or more is taken from it than one layer's output, or
            vLLM cannot show its videos.
    """
    vision, chosen = config.vision_config, config.vision_feature_layer
    kind = getattr(vision, "model_type", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    # [CLS] must be there for CLIP to drop, and must not be there for SigLIP to keep all.
    wanted = {"clip_vision_model": "default", "siglip_vision_model": "full"}
    if kind not in wanted:
        raise UnsupportedModel(
            f"visual tokens can be reduced in CLIP and SigLIP towers, not in {kind!r}"
        )
    if strategy != wanted[kind]:
        raise UnsupportedModel(
            f"a {kind!r} tower is supported with vision_feature_select_strategy = "
            f"{wanted[kind]!r}, not {strategy!r}"
        )
    side = vision.image_size // vision.patch_size
    if config.model_type == "llava_next_video" and side % config.spatial_pool_stride:
        raise UnsupportedModel(
            f"the {side} x {side} patches of a frame do not divide into squares of "
            f"spatial_pool_stride = {config.spatial_pool_stride}: vLLM counts tokens for those at "
            "the edges, and makes none"
        )
    stride = getattr(config, "spatial_pool_stride", 2)
    if config.model_type == "llava_onevision" and stride != 2:
        raise UnsupportedModel(
            f"spatial_pool_stride = {stride}: vLLM counts a video's tokens by it, and makes them "
            "by 2"
        )
    if config.model_type != "llava" and not isinstance(chosen, int):
        raise UnsupportedModel(
            "features of several layers of the tower cannot be reduced (vision_feature_layer = "
            f"{chosen})"
        )
    # As vLLM: the deepest of the layers; a negative index counts from the output of the last.
    deepest = max(
        layer if layer >= 0 else vision.num_hidden_layers + layer + 1
        for layer in ([chosen] if isinstance(chosen, int) else chosen)
    )
    return Geometry((side, side), deepest, kind == "clip_vision_model")


def decoder_stages(config: Any) -> tuple[int, ...]:
    """The first layers of the decoder stages that a server has been started with.

    They are said with ``--hf-overrides``, as a part of the model's configuration, which every
    process of vLLM has; ``vllm-ficoco serve --reduction-stages`` puts them there.

    Raises:
        ValueError: they are not layers of this decoder in ascending order.
    """
    starts, layers = getattr(config, STAGES_KEY, ()), config.text_config.num_hidden_layers
    valid = all(type(start) is int and 0 < start < layers for start in starts)
    if not valid or list(starts) != sorted({*starts}):
        raise ValueError(
            f"{STAGES_KEY} = {starts} is not valid: it must be layers of the decoder, from 1 to "
            f"{layers - 1}, in ascending order"
        )
    levels = _levels(config.vision_config)
    if starts and starts[0] < levels:
        raise ValueError(
            f"{STAGES_KEY} = {starts} is not valid: the decoder's first {levels} layers take in "
            f"visual tokens of the vision tower's (deepstack), so a stage can start at {levels} or "
            "later"
        )
    return tuple(starts)


def graphed(config: Any, geometry: Geometry) -> dict[str, Reduction]:
    """By name, the settings with which images of LLaVA-1.5 run in CUDA graphs of the tower.

    They are said as :func:`decoder_stages` are, as a list of what :func:`settings.declared` reads.
    Those that reduce nothing here are left out, and those that this tower cannot follow.

    Raises:
        ValueError: what is said is something else.
    """
    said, found = getattr(config, GRAPHS_KEY, ()), {}
    if isinstance(said, str):
        said = said.split(",")
    for text in said:
        try:
            method, rung = declared(text.strip())
        except ValueError as error:
            raise ValueError(f"{text!r} in {GRAPHS_KEY} is not valid: it must be {error}") from None
        (budget,) = schedule.ladder(geometry.tokens, [rung])
        reduction = Reduction(method=method, budget=budget)
        with suppress(SettingsError):
            if geometry.parts(reduction):
                found[f"{method}@{budget}"] = reduction
    return found
