# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's route for prompts that another server has rendered.

``/inference/v1/generate`` (of a server with ``--enable-scale-out``) takes images as the client says
that they were processed: a place in the prompt, a hash, and the processor's fields, or none of
them where the engine has them under the hash. A model that returns fewer rows than a place has
ends the engine, so the three must agree before a request gets there.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.scale_out.token_in_token_out.mm_features import mm_kwargs_from_features
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.exceptions import VLLMValidationError

from ficoco_server.metrics import INVALID, REQUESTS
from ficoco_server.policy import Policy
from ficoco_server.reducer import Reducer
from ficoco_server.resolve import Level, settle
from vllm_ficoco.engine.checks import needs_whole_prompt
from vllm_ficoco.models.processing import tokens_by_hash
from vllm_ficoco.packed import PACKED_FIELD, unpack
from vllm_ficoco.settings import REDUCTION_KEY, Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry, UnsupportedModel

PIXELS, EMBEDS, HANDLE = "pixel_values", "image_embeds", "signature"


class ReductionTokens(ServingTokens):
    """vLLM's handler, which looks at images before the engine gets them."""

    reducer: Reducer

    async def serve_tokens(self, request: Any, raw_request: Any = None) -> Any:
        """As in vLLM."""
        supported = not isinstance(self.reducer.geometry, UnsupportedModel)
        if request.features is not None and supported:
            try:
                check_features(request, self.reducer)
            except SettingsError as error:
                REQUESTS.labels(INVALID, "refused").inc()
                raise VLLMValidationError(str(error), parameter=error.field) from None
        return await super().serve_tokens(request, raw_request)


def check_features(request: Any, reducer: Reducer) -> None:
    """Whether the parts of every rendered image agree, and with what this server can do.

    Raises:
        SettingsError: which do not.
    """
    features, params, geometry = request.features, request.sampling_params, reducer.geometry
    assert not isinstance(geometry, UnsupportedModel)
    items = mm_kwargs_from_features(features).get("image", [])
    for i, item in enumerate(items):
        mm_hash, place = features.mm_hashes["image"][i], features.mm_placeholders["image"][i]
        due = by_hash = tokens_by_hash(mm_hash, geometry)
        why = "what its hash says"
        if item is not None:
            field = f"features.kwargs_data.image[{i}]"
            reduction = _packed_in(item, field, reducer.policy, geometry)
            if PIXELS in item and EMBEDS not in item:
                due, why = geometry.kept(reduction), "what its settings keep"
                side = reducer.image_size
                if _shape(item, PIXELS) != (3, side, side):
                    allowed = f"of shape {(3, side, side)}"
                    raise SettingsError(f"{field}.{PIXELS}", _shape(item, PIXELS), allowed)
            elif EMBEDS in item and PIXELS not in item and reduction is None:
                due, why = (*_shape(item, EMBEDS), 0)[0], "what its embeddings have"
                if _shape(item, EMBEDS) != (due, reducer.decoder.hidden_size):
                    allowed = f"of {reducer.decoder.hidden_size} numbers a token"
                    raise SettingsError(f"{field}.{EMBEDS}", _shape(item, EMBEDS), allowed)
            elif not (request.ec_transfer_params or (reducer.shared_memory and HANDLE in item)):
                # Another instance has not encoded it, and it is not in memory, signed by vLLM.
                raise SettingsError(field, sorted(item), f"{PIXELS}, or {EMBEDS} without settings")
            whole = needs_whole_prompt(params)
            if whole and reduction is not None and reduction.spec.decoder:
                allowed = "left out where tokens leave inside the decoder"
                raise SettingsError(f"sampling_params.{whole}", getattr(params, whole), allowed)
        if place.length != due:
            field = f"features.mm_placeholders.image[{i}].length"
            raise SettingsError(field, place.length, f"{due}, {why}")
        if by_hash != due:
            allowed = f"a render's, of an image with {due} visual tokens"
            raise SettingsError(f"features.mm_hashes.image[{i}]", mm_hash, allowed)


def _shape(item: Any, name: str) -> tuple[int, ...]:
    return tuple(getattr(item[name].data, "shape", ()))


def _packed_in(item: Any, field: str, policy: Policy, geometry: Geometry) -> Reduction | None:
    """The settings that travel with an image, where this server lets a request have them."""
    packed = item.get(PACKED_FIELD)
    try:
        reduction = unpack(packed.data).reduction if packed is not None else None
    except (ValueError, AttributeError, TypeError):
        allowed = "an item with settings as a render writes them"
        raise SettingsError(field, PACKED_FIELD, allowed) from None
    if reduction is None:
        return None
    said = Level(field, {REDUCTION_KEY: reduction.model_dump()})
    [admitted] = settle(policy, Level(), [said], geometry)
    return admitted
