# SPDX-License-Identifier: Apache-2.0
"""vLLM's multimodal processing area: settings in, placeholders, hashes and data that follow them.

A family adds :class:`ReducingProcessor` to vLLM's processor and says which layout an image of some
size has (:mod:`vllm_ficoco.models.llava_next`), and a video that was processed. How many tokens
an image or a video has unreduced is what vLLM's own prompt updates say; they are shortened, and
must agree with the layout.

What an image comes to is known from its size, before anything is processed; which frames a video
is cut down to, its processor decides.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalHashes
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    DictEmbeddingItems,
    ImageEmbeddingItems,
    ImageProcessorItems,
    ImageSize,
    MultiModalDataItems,
    VideoEmbeddingItems,
)
from vllm.multimodal.processing import PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import PromptUpdateDetails

from vllm_ficoco.models import defaults
from vllm_ficoco.models.question import questions
from vllm_ficoco.packed import PACKED_FIELDS, Packed, pack, packed_of
from vllm_ficoco.preview import PREVIEW_KEY, Area, Mark
from vllm_ficoco.settings import (
    BUDGET_KEY,
    MODALITIES,
    NO_REDUCTION,
    REDUCTION_KEY,
    AutoBudget,
    Lowered,
    OfLadder,
    Reduction,
    SettingsError,
    per_item,
)
from vllm_ficoco.vision.complexity import UnknownPixels, asks_for
from vllm_ficoco.vision.geometry import Geometry, UnsupportedModel, geometry_of
from vllm_ficoco.vision.layout import Layout

COUNTS_KEYS = {"image": "visual_tokens", "video": "visual_tokens_of_videos"}
"""In the engine input that the processor makes, by modality: a list of :class:`Packed`, one an
item."""
COUNTS_KEY = COUNTS_KEYS["image"]
LOWERED_KEY = "lowered_visual_tokens"
"""There, too: which images hold less than they would if nothing had been lowered; empty, if nothing
was to be."""

SIZES_KEY = "image_sizes_of_preview"
"""There, too, where somebody follows images: width and height of every one, as it was loaded, and
:meth:`ReducingProcessor.seen_of` it."""

QUESTIONS_KEY = "reduction_questions"
"""Among processor options, where :meth:`ReducingProcessor.apply` puts the question of every item
whose method asks for it, by modality; no request can."""
_WHERE_KEY = "reduction_where"
"""There, too, by modality: of items that are processed, which ones of the prompt they are, and
where their settings stood."""
_NOT_FOR_REQUESTS = (QUESTIONS_KEY, _WHERE_KEY)

_EMBEDDINGS = (ImageEmbeddingItems, VideoEmbeddingItems, DictEmbeddingItems)
"""Items that come as embeddings."""

Asked = Mapping[str, list[Reduction | None]]
"""By modality, the settings of every item."""

_KEPT = "-kept"
"""Before the number of its visual tokens in the hash of a reduced image."""


_REMEMBERED = 65536
"""Images with a uuid of which it is remembered what ``auto`` came to."""


def tokens_by_hash(mm_hash: str, geometry: Geometry) -> int:
    """Visual tokens of an image in a cache of vLLM's that is found by this hash; never fewer.

    Only where all images have one layout: else an image is not seen where it is named by its uuid.
    """
    kept = mm_hash.rpartition(_KEPT)[2] if _KEPT in mm_hash else ""
    counts = map(str, range(1, geometry.tokens))  # a client's uuid may end in any number
    return int(kept) if kept in counts else geometry.tokens


def _without_ours(kwargs: Mapping[str, object]) -> dict[str, object]:
    """What the Hugging Face processor may see."""
    ours = (BUDGET_KEY, REDUCTION_KEY, PREVIEW_KEY, *_NOT_FOR_REQUESTS)
    return {k: v for k, v in kwargs.items() if k not in ours}


_geometries: dict[int, tuple[weakref.ref[Any], Geometry]] = {}


def _geometry(config: Any) -> Geometry:
    """Of a model's configuration; found once, as vLLM makes a processor for every request."""
    known = _geometries.get(id(config))
    if known is not None and known[0]() is config:
        return known[1]
    try:
        geometry = geometry_of(config)
    except UnsupportedModel as error:
        geometry = Geometry.none(str(error))
    _geometries[id(config)] = weakref.ref(config), geometry
    return geometry


def _mark(kwargs: Mapping[str, object]) -> dict[str, object]:
    """The mark of images that somebody follows, under its key; empty for all others."""
    return {PREVIEW_KEY: kwargs[PREVIEW_KEY]} if PREVIEW_KEY in kwargs else {}


def _asks(reduction: Reduction | None) -> bool:
    return reduction is not None and reduction.spec.asks_question


def _key(kwargs: Mapping[str, object]) -> str:
    """Which of the two keys the settings stand under."""
    return BUDGET_KEY if kwargs.get(REDUCTION_KEY) is None else REDUCTION_KEY


def _within(kwargs: Mapping[str, object], modality: str, item: int) -> str:
    """Where an item's settings stand, for messages."""
    key = _key(kwargs)
    value = kwargs.get(key)
    if isinstance(value, Mapping) and modality in value:
        key, value = f"{key}.{modality}", value[modality]
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return f"{key}[{item}]" if listed else key


class ScaledImages(ImageProcessorItems):
    """Images, some of them scaled down when they are asked for.

    Args:
        images: as they were sent.
        sizes: of every image; None for one that stays as it is.
    """

    def __init__(self, images: ImageProcessorItems, sizes: Sequence[ImageSize | None]) -> None:
        super().__init__(images.data)
        self.sizes = sizes

    def get(self, index: int) -> Any:
        image, size = super().get(index), self.sizes[index]
        if size is None:
            return image
        if not isinstance(image, Image.Image):
            raise VLLMValidationError(
                f"Image {index} comes as an array, which resize does not take: send a file or a "
                "PIL image.",
                parameter=REDUCTION_KEY,
            )
        return image.resize((size.width, size.height), Image.Resampling.BICUBIC)

    def get_image_size(self, item_idx: int) -> ImageSize:
        return self.sizes[item_idx] or super().get_image_size(item_idx)


class RefusedImage(VLLMValidationError):
    """Settings that one image or video, by its size, cannot follow; vLLM answers with a 400."""

    def __init__(
        self, image: int, error: SettingsError, within: str, modality: str = "image"
    ) -> None:
        """
        Args:
            image: which one of the prompt's images, or videos.
            error: its field relative to the item's settings: ``budget``, ``method``, ...
            within: where those were given.
            modality: ``image`` or ``video``.
        """
        self.image, self.error, self.modality = image, error, modality
        field = f"{within}.{error.field}" if within.startswith(REDUCTION_KEY) else within
        full = SettingsError(field, error.value, error.allowed)
        super().__init__(str(full), parameter=field)


class RefusedPositions(VLLMValidationError):
    """A prompt whose images would take positions that the model has not; a 400."""


class CountedDetails(PromptUpdateDetails):
    """An item's placeholders, and what was settled for it. vLLM keeps these objects beside its
    processor cache, so that an item that is found there has them, too."""

    packed: Packed
    span: int
    """Positions that it takes, in models whose positions have three rows."""


class ReducingProcessor:
    """The mixin for vLLM's processors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.geometry = _geometry(self.info.get_hf_config())  # type: ignore[attr-defined]
        server_wide = self.info.ctx.get_mm_config().mm_processor_kwargs or {}  # type: ignore[attr-defined]
        for key in (BUDGET_KEY, REDUCTION_KEY):
            if key in server_wide:
                raise ValueError(
                    f"{key} in an engine's mm_processor_kwargs (--mm-processor-kwargs) has no "
                    "effect: a budget belongs to a prompt or a request. For those that say none "
                    f"set {defaults.BUDGET}, and {defaults.METHOD}, in the environment"
                )
        self._default = defaults.from_environment(self.geometry, lambda: self.largest_layout)
        """The settings of an image where neither a front end nor its prompt says any."""
        self._came_to: dict[tuple[str, str, str], Reduction | None] = {}
        """Of images with a uuid: what a budget that waits for the image was, for this image."""

    def layout_of(
        self, width: int, height: int, kwargs: Mapping[str, object] | None = None
    ) -> Layout:
        """The layout of an image of so many pixels; a family's own where it depends on them.

        Args:
            width: of the image.
            height: of the image.
            kwargs: processor options of the request, where they change how many tokens it has.
        """
        return self.geometry.layout

    def video_layouts(self, processed: BatchFeature) -> Sequence[Layout]:
        """The layouts of the videos that were processed; of families whose videos can be reduced.

        Raises:
            VLLMValidationError: the model cannot take one of them in.
        """
        raise NotImplementedError

    def seen_of(self, width: int, height: int) -> Area:
        """What the tower sees of an image as a whole."""
        return 0.0, 0.0, 1.0, 1.0

    def smaller_sizes(
        self, width: int, height: int, kwargs: Mapping[str, object] | None
    ) -> Iterable[ImageSize]:
        """Sizes to which an image can be scaled down, those with most tokens first."""
        return ()

    def scaled(
        self, width: int, height: int, budget: int, kwargs: Mapping[str, object] | None
    ) -> ImageSize:
        """The size with most tokens that are within a budget, of an image that has more.

        Sizes are counted, one by one: processors enlarge small images, and shrink thin ones less
        than they were told to.

        Raises:
            SettingsError: an image of this shape has more at every size.
        """
        least = None
        for size in self.smaller_sizes(width, height, kwargs):
            try:
                tokens = self.layout_of(size.width, size.height, kwargs).tokens
            except ValueError:
                continue  # whole tokens have made a long image too long for the processor
            if tokens <= budget:
                return size
            least = min(tokens, least or tokens)
        allowed = f"at least {least}" if least else "as many as the image has"
        raise SettingsError(
            "budget", budget, f"{allowed}, for an image of {width} x {height} pixels by resize"
        )

    def _as_tokens(
        self, reduction: Reduction | None, size: ImageSize, kwargs: Mapping[str, object]
    ) -> tuple[Layout, ImageSize | None]:
        """The layout of an image with its settings, and to which size it is scaled for them.

        Raises:
            SettingsError: it cannot be scaled as far as the settings say.
        """
        layout = self.layout_of(size.width, size.height, kwargs)
        if reduction is None or reduction.spec.place != "input":
            return layout, None
        self.geometry.check_method(reduction)
        active = reduction.for_tokens(layout.tokens)
        if active is None:
            return layout, None
        assert active.budget is not None
        smaller = self.scaled(size.width, size.height, active.budget, kwargs)
        fitted = self.layout_of(smaller.width, smaller.height, kwargs)
        return fitted._replace(original=layout.tokens), smaller

    @cached_property
    def largest_layout(self) -> Layout:
        """Of the image that has most visual tokens."""
        size = self.info.get_image_size_with_most_features()  # type: ignore[attr-defined]
        return self.layout_of(size.width, size.height)

    def _asked(self, kwargs: Mapping[str, object], items: MultiModalDataItems) -> Asked:
        """The settings of every image and video, before its size is looked at.

        Raises:
            VLLMValidationError: they cannot be used; vLLM answers with a 400.
        """
        key = _key(kwargs)
        counts = {modality: items.get_count(modality, strict=False) for modality in MODALITIES}
        try:
            asked = per_item(kwargs, counts)
            for modality, settings in asked.items():
                if not any(settings):
                    continue
                unsupported = self.geometry.unsupported
                refused = f"left out: {unsupported}" if unsupported else ""
                if not refused and isinstance(items[modality], _EMBEDDINGS):
                    refused = f"left out with {modality}_embeds inputs"
                if refused:
                    raise SettingsError(key, kwargs.get(key), refused)
                if modality == "video":
                    self._check_videos(kwargs, settings)
        except SettingsError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None
        return asked

    def _check_videos(
        self, kwargs: Mapping[str, object], settings: Sequence[Reduction | None]
    ) -> None:
        """Refuses what no video of the model can have, before any is processed.

        Raises:
            RefusedImage: the first one has.
        """
        for video, reduction in enumerate(settings):
            try:
                if reduction is not None and reduction.method != NO_REDUCTION:
                    self.geometry.check_method(reduction, video=True)
            except SettingsError as error:
                within = _within(kwargs, "video", video)
                raise RefusedImage(video, error, within, "video") from None

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """As vLLM's, which measures with them what an engine must have room for: whole images."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        inputs.dummy = True
        return inputs

    def _by_default(self, inputs: ProcessorInputs) -> bool:
        """Give images of which the prompt says nothing the default settings, if it is for us to do.

        Returns:
            Whether they have them now.
        """
        kwargs, items = inputs.hf_processor_mm_kwargs, inputs.mm_data_items
        if defaults.left_to_front_end() or getattr(inputs, "dummy", False):
            return False
        defaults.tell_of_no_front_end()
        if any(kwargs.get(key) is not None for key in (BUDGET_KEY, REDUCTION_KEY)):
            return False
        if not items.get_count("image", strict=False) or isinstance(items["image"], _EMBEDDINGS):
            return False
        if self._default is None:
            return False
        inputs.hf_processor_mm_kwargs = {**kwargs, REDUCTION_KEY: {"image": self._default}}
        return True

    def _choose(self, inputs: ProcessorInputs) -> None:
        """Put what they come to in place of the budgets of a ladder, before anything is hashed.

        Of an image that is named by its uuid alone, that is what it came to when it was here; where
        that is not known, the budget stays what it is.

        Raises:
            VLLMValidationError: as :meth:`_asked`; or an image has pixels that cannot be read.
            RefusedImage: the settings cannot be followed with any of the budgets.
        """
        kwargs, items = inputs.hf_processor_mm_kwargs, inputs.mm_data_items
        asked = self._asked(kwargs, items)
        settings = [*asked["image"]]
        if not any(isinstance(reduction, OfLadder) for reduction in settings):
            return
        images: Any = items["image"]
        uuids = (inputs.mm_uuid_items or {}).get("image") or [None] * len(settings)
        options = _without_ours(kwargs)
        inputs.lowered = [False] * len(settings)
        for image, reduction in enumerate(settings):
            if not isinstance(reduction, OfLadder):
                continue
            known = (str(uuids[image]), reduction.key, repr(sorted(options.items())))
            seen = images[image] is not None
            chosen: Reduction | None = reduction
            if seen or (isinstance(reduction, Lowered) and not self.geometry.by_image):
                try:
                    chosen, less = self._first_reached(reduction, images, image, options)
                    inputs.lowered[image] = less
                except SettingsError as error:
                    raise RefusedImage(image, error, _within(kwargs, "image", image)) from None
            elif known in self._came_to:
                chosen = self._came_to[known]
            if uuids[image] is not None and chosen is not reduction:
                self._came_to.pop(known, None)
                self._came_to[known] = chosen  # the last ones are the youngest
                if len(self._came_to) > _REMEMBERED:
                    del self._came_to[next(iter(self._came_to))]
            settings[image] = chosen
        chosen_for: Any = {**asked, "image": settings} if asked["video"] else settings
        inputs.hf_processor_mm_kwargs = {**options, **_mark(kwargs), _key(kwargs): chosen_for}

    def _first_reached(
        self, ladder: OfLadder, images: Any, image: int, options: Mapping[str, object]
    ) -> tuple[Reduction | None, bool]:
        """An image's settings with the first budget of its choices that the method can reach, and
        whether they are less than if nothing had been lowered.

        Raises:
            VLLMValidationError: its pixels cannot be read.
            SettingsError: it can reach none, or something else is wrong.
        """
        size = images.get_image_size(image) if self.geometry.by_image else ImageSize(0, 0)
        tokens = self.layout_of(size.width, size.height, options).sent
        if isinstance(ladder, AutoBudget):
            try:
                asks = asks_for(images.get(image))
            except UnknownPixels as error:
                raise VLLMValidationError(
                    f"Image {image} cannot have the budget 'auto': {error}", parameter=BUDGET_KEY
                ) from None
            choices = ladder.choices(tokens, *asks)
            usual = ladder.model_copy(update={"lower": 0}).choices(tokens, *asks)[0]
        else:
            assert isinstance(ladder, Lowered)
            choices = ladder.choices(tokens)
            usual = choices[-1]

        def reached(budget: int) -> SettingsError | None:
            reduction = ladder.at(budget)
            try:
                layout, _ = self._as_tokens(reduction, size, options)
                self.geometry.kept(reduction, layout=layout)
            except SettingsError as error:
                if error.field != "budget":
                    raise
                return error
            return None

        # What is wrong whatever the budget must not hang on what is in the image.
        refused = reached(ladder.ladder(tokens)[-1])
        for budget in choices:
            refused = reached(budget)
            if refused is None:
                return ladder.at(budget).for_tokens(tokens), budget < usual
        assert refused is not None
        raise refused

    def _fitted(
        self, kwargs: Mapping[str, object], items: MultiModalDataItems
    ) -> tuple[dict[str, list[Packed]], MultiModalDataItems]:
        """By modality, the settings of every item as its size lets them be and its layout; and the
        items, those images scaled down that are to be.

        An image that is named by its uuid alone has no size: it keeps the settings that were
        asked for, and no layout. Nor has a video that is not processed.

        Raises:
            VLLMValidationError: as :meth:`_asked`.
            RefusedImage: a budget cannot be reached.
        """
        asked = self._asked(kwargs, items)
        asking = self._questions(kwargs, asked)
        images, items = self._fitted_images(kwargs, items, asked["image"], asking["image"])
        videos = [
            Packed(reduction, None, question if _asks(reduction) else ())
            for reduction, question in zip(asked["video"], asking["video"], strict=True)
        ]
        return {"image": images, "video": videos}, items

    def _fitted_images(
        self,
        kwargs: Mapping[str, object],
        items: MultiModalDataItems,
        asked: Sequence[Reduction | None],
        asking: Sequence[tuple[int, ...]],
    ) -> tuple[list[Packed], MultiModalDataItems]:
        images: Any = items["image"] if asked else ()
        if isinstance(images, _EMBEDDINGS):
            self.check_embeddings(images)
        if self.geometry.unsupported or isinstance(images, _EMBEDDINGS):
            return [Packed()] * len(asked), items
        settled: list[Packed] = []
        sizes: list[ImageSize | None] = []
        options = _without_ours(kwargs)
        for image, reduction in enumerate(asked):
            layout = size = None
            try:
                if isinstance(reduction, OfLadder):
                    pass  # of an image that is not here and not known
                elif not self.geometry.by_image:
                    layout = self.geometry.layout
                elif images[image] is not None:
                    sent = images.get_image_size(image)
                    layout, size = self._as_tokens(reduction, sent, options)
                if layout is not None:
                    self.geometry.kept(reduction, layout=layout)
                    reduction = reduction and reduction.for_tokens(layout.sent)
            except SettingsError as error:
                raise RefusedImage(image, error, _within(kwargs, "image", image)) from None
            settled.append(Packed(reduction, layout, asking[image] if _asks(reduction) else ()))
            sizes.append(size)
        if any(sizes):
            items = MultiModalDataItems({**items, "image": ScaledImages(images, sizes)})
        return settled, items

    def _fitted_videos(
        self,
        kwargs: Mapping[str, object],
        asked: Sequence[Packed],
        items: MultiModalDataItems,
        processed: BatchFeature,
    ) -> list[Packed]:
        """The settings of every video as its frames let them be, and its layout.

        Raises:
            RefusedImage: a budget cannot be reached.
        """
        if not asked or self.geometry.unsupported or self.geometry.videos == "whole":
            return []
        if isinstance(items["video"], _EMBEDDINGS):
            return []
        where: Any = kwargs.get(_WHERE_KEY)
        settled = []
        for video, layout in enumerate(self.video_layouts(processed)):
            reduction, _, question, *_ = asked[video]
            try:
                self.geometry.kept(reduction, layout=layout)
                reduction = reduction and reduction.for_tokens(layout.sent)
            except SettingsError as error:
                number, within = (
                    where["video"][video] if where else (video, _within(kwargs, "video", video))
                )
                raise RefusedImage(number, error, within, "video") from None
            settled.append(Packed(reduction, layout, question if reduction else ()))
        return settled

    def check_embeddings(self, images: Any) -> None:
        """Whether images that come as embeddings have the rows that vLLM will look for.

        Raises:
            VLLMValidationError: one has not.
        """
        for image in range(len(images)):
            if not images.get_feature_size(image):
                raise VLLMValidationError(
                    f"Image {image} comes as embeddings without any row: it must have one for "
                    "every visual token.",
                    parameter="image_embeds",
                )

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        """An item's hash depends on its own settings, not on those of its neighbours.

        An unreduced one has the hash that vLLM gives it, so its cached data are shared. Settings
        count as what they come to for the image; but where a layout depends on the image, and it is
        named by its uuid, as they were asked for: by its uuid alone it is found by the same hash.
        So do a video's. Where the method asks for the question, the hash depends on that as well.
        """
        settled, _ = self._fitted(inputs.hf_processor_mm_kwargs, inputs.mm_data_items)
        asked = self._asked(inputs.hf_processor_mm_kwargs, inputs.mm_data_items)
        uuids = (inputs.mm_uuid_items or {}).get("image") or [None] * len(asked["image"])
        settings = {
            **asked,
            "image": [
                packed.reduction if uuid is None or not self.geometry.by_image else said
                for packed, said, uuid in zip(settled["image"], asked["image"], uuids, strict=True)
            ],
        }
        ours = inputs.hf_processor_mm_kwargs
        inputs.hf_processor_mm_kwargs = _without_ours(ours)
        try:
            hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        finally:
            inputs.hf_processor_mm_kwargs = ours
        asking = self._questions(ours, settings)
        for modality, reductions in settings.items():
            if any(reductions):
                each = zip(hashes[modality], reductions, asking[modality], strict=True)
                hashes[modality] = [
                    self._hash(modality, plain, reduction, question, _mark(ours))
                    if reduction
                    else plain
                    for plain, reduction, question in each
                ]
        return hashes

    def _hash(
        self,
        modality: str,
        plain: str,
        reduction: Reduction,
        question: Sequence[int],
        mark: Mapping[str, object],
    ) -> str:
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm  # type: ignore[attr-defined]
        more = {"question": repr([*question])} if _asks(reduction) else {}
        more |= {key: str(value) for key, value in mark.items()}
        made = MultiModalHasher.hash_kwargs(
            algorithm, **{modality: plain}, reduction=reduction.key, **more
        )
        if modality == "video" or self.geometry.by_image or isinstance(reduction, OfLadder):
            return made  # it says nothing of tokens, or is in no cache
        return f"{made}{_KEPT}{self.geometry.kept(reduction)}"

    def _get_cache_missing_items(
        self, cache: Any, mm_data_items: MultiModalDataItems, mm_hashes: MultiModalHashes
    ) -> Any:
        """As vLLM's, which does not say that an item is known by its uuid and its settings.

        Raises:
            VLLMValidationError: an item came as a uuid alone, and is not known.
        """
        for modality in MODALITIES:
            for item, item_hash in enumerate(mm_hashes.get(modality, ())):
                if mm_data_items[modality][item] is None and not cache.is_cached_item(item_hash):
                    a = "an image" if modality == "image" else f"a {modality}"
                    raise VLLMValidationError(
                        f"{modality.capitalize()} {item} has a uuid and no data, and is not known: "
                        f"{a} is kept by its uuid together with its budget, method and options "
                        "(and the question, for methods that ask for it), and not for ever. Send "
                        "its data again.",
                        parameter="uuid",
                    )
        return super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)  # type: ignore[misc]

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        """Settings of the items that are not in the processor cache."""
        ours = inputs.hf_processor_mm_kwargs
        asked = self._asked(ours, inputs.mm_data_items)
        inputs.hf_processor_mm_kwargs = _without_ours(ours)
        try:
            kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        finally:
            inputs.hf_processor_mm_kwargs = ours
        asking = self._questions(ours, asked)
        missing = {
            modality: [i for i, hit in enumerate(mm_is_cached.get(modality, ())) if not hit]
            for modality in asked
        }
        settings = {m: [asked[m][i] for i in items] for m, items in missing.items()}
        if not any(reduction for reductions in settings.values() for reduction in reductions):
            return kwargs
        return {
            **kwargs,
            **_mark(ours),
            REDUCTION_KEY: settings,
            QUESTIONS_KEY: {m: [asking[m][i] for i in items] for m, items in missing.items()},
            _WHERE_KEY: {
                m: [(i, _within(ours, m, i)) for i in items] for m, items in missing.items()
            },
        }

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """The Hugging Face processor's output and one packed field an item."""
        settled, items = self._fitted(hf_kwargs, mm_items)
        processed = super()._apply_hf_processor_main(items, _without_ours(hf_kwargs))  # type: ignore[misc]
        if any(packed.layout for packed in settled["image"]):
            self.strip_padding(processed, settled["image"])
            processed[PACKED_FIELDS["image"]] = [
                pack(
                    packed.reduction,
                    packed.layout if self.geometry.by_image else None,
                    packed.question,
                    str(hf_kwargs.get(PREVIEW_KEY, "")) if packed.reduction else "",
                )
                for packed in settled["image"]
            ]
        videos = self._fitted_videos(hf_kwargs, settled["video"], items, processed)
        if videos:
            processed[PACKED_FIELDS["video"]] = [pack(*packed) for packed in videos]
        return processed

    def strip_padding(self, processed: BatchFeature, settled: Sequence[Packed]) -> None:
        """Takes what is not a reduced image's own out of the processor's output."""

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, _without_ours(hf_processor_mm_kwargs))  # type: ignore[misc]
        # On the CPU: the model reads the settings to lay out its work, and must not wait for them.
        ours = {
            name: MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality, name in PACKED_FIELDS.items()
        }
        return {**fields, **ours}

    # vLLM calls it by keyword.
    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        settled, items = self._fitted(hf_processor_mm_kwargs, mm_items)
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items=items,
            hf_processor_mm_kwargs=_without_ours(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )

        def details(update: Any, item: int) -> PromptUpdateDetails:
            whole, fields = update._resolve_content(item), out_mm_kwargs[update.modality][item]
            # A video has its layout since it was processed; of an image, the field may have none.
            packed = settled["image"][item] if update.modality == "image" else packed_of(fields)
            return self.placeholders(whole, packed, fields)

        def counted(update: Any) -> Any:
            name, items = PACKED_FIELDS.get(update.modality), out_mm_kwargs.get(update.modality, ())
            if not any(name in item for item in items):
                return update
            return replace(update, replacement=partial(details, update))

        return [counted(update) for update in updates]

    def placeholders(
        self, whole: PromptUpdateDetails, packed: Packed, fields: Mapping[str, Any]
    ) -> CountedDetails:
        """As many of vLLM's placeholders of an unreduced item as its settings keep.

        Args:
            whole: vLLM's.
            packed: the item's settings and its layout.
            fields: the processor's of the item.
        """
        details = self._shortened(whole, packed)
        details.packed = packed
        return details

    def _shortened(self, whole: PromptUpdateDetails, packed: Packed) -> CountedDetails:
        assert packed.layout is not None
        self.check_count(len(whole.full), packed.layout)
        return CountedDetails(
            whole.full[: self.geometry.kept(packed.reduction, layout=packed.layout)]
        )

    def check_count(self, whole: int, layout: Layout) -> None:
        """Whether an item has as many visual tokens unreduced as its layout says.

        Raises:
            VLLMValidationError: options of the request have changed that.
        """
        if whole == layout.tokens:
            return
        if self.geometry.is_native:  # do_resize, or what else the client has said
            an = "A video" if layout.is_video else "An image"
            raise VLLMValidationError(
                f"{an} has {whole} visual tokens, where the model would make {layout.tokens} "
                "of it: leave out what changes that.",
                parameter="mm_processor_kwargs",
            )
        raise RuntimeError(f"vLLM counts {whole} visual tokens, but {layout} has {layout.tokens}")

    @staticmethod
    def _questions(
        kwargs: Mapping[str, object], settings: Asked
    ) -> Mapping[str, Sequence[tuple[int, ...]]]:
        """Of every item with these settings, as :meth:`apply` has put them there."""
        none: Any = {modality: [()] * len(each) for modality, each in settings.items()}
        asking: Any = kwargs.get(QUESTIONS_KEY)
        return none if asking is None else asking

    def _with_questions(self, inputs: ProcessorInputs) -> Mapping[str, object]:
        """Processor options with the question of every item, where a method asks for one.

        Raises:
            VLLMValidationError: the request has some itself; or as :meth:`_asked`.
        """
        kwargs = inputs.hf_processor_mm_kwargs
        for key in _NOT_FOR_REQUESTS:
            if key in kwargs:
                raise VLLMValidationError(
                    f"{key} is not for requests to set: leave it out. An image's question is read "
                    "from the prompt.",
                    parameter=key,
                )
        if not isinstance(kwargs.get(PREVIEW_KEY, Mark()), Mark):
            raise VLLMValidationError(
                f"{PREVIEW_KEY} is not for requests to set: leave it out.", parameter=PREVIEW_KEY
            )
        asked = self._asked(kwargs, inputs.mm_data_items)
        if not any(_asks(reduction) for settings in asked.values() for reduction in settings):
            return kwargs
        tokenizer, config = self.info.get_tokenizer(), self.info.get_hf_config()  # type: ignore[attr-defined]
        counts = {
            getattr(config, f"{modality}_token_id"): len(settings)
            for modality, settings in asked.items()
            if settings
        }
        found = iter(questions(inputs.prompt, counts, self._unspoken, tokenizer).values())
        asking = {modality: next(found) if settings else [] for modality, settings in asked.items()}
        return {**kwargs, QUESTIONS_KEY: asking}

    @cached_property
    def _unspoken(self) -> frozenset[int]:
        """Tokens that are no text."""
        tokenizer = self.info.get_tokenizer()  # type: ignore[attr-defined]
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marks = [number for number, token in added.items() if token.special]
        return frozenset(marks) | frozenset(tokenizer.all_special_ids)

    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        result = super()._cached_apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        inputs.details = {
            modality: [updates[0].content for updates in result.prompt_updates.get(modality, ())]
            for modality in MODALITIES
        }
        return result

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """As vLLM's, and what was settled for every item: the engine does not mind more keys."""
        by_default = self._by_default(inputs)
        try:
            return self._apply(inputs, timing_ctx)
        except RefusedImage as refused:
            if not by_default:
                raise
            error = refused.error
            allowed = (
                f"{error.allowed} ({error.value} is {defaults.BUDGET}, for prompts that say none)"
            )
            error = SettingsError(error.field, error.value, allowed)
            raise RefusedImage(refused.image, error, BUDGET_KEY) from None

    def _apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        self._choose(inputs)
        ours = inputs.hf_processor_mm_kwargs
        inputs.hf_processor_mm_kwargs = self._with_questions(inputs)
        try:
            made = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        finally:
            inputs.hf_processor_mm_kwargs = ours
        for modality, key in COUNTS_KEYS.items():
            made[key] = [getattr(of, "packed", Packed()) for of in inputs.details[modality]]
        made[LOWERED_KEY] = getattr(inputs, "lowered", ())
        if PREVIEW_KEY in ours:
            images: Any = inputs.mm_data_items["image"]
            sizes = [images.get_image_size(image) for image in range(len(images))]
            made[SIZES_KEY] = [(*size, self.seen_of(*size)) for size in sizes]
        return made
