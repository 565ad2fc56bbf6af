# SPDX-License-Identifier: Apache-2.0
"""The front end's memory of what the engine has, against the engine's own cache of vLLM."""

from __future__ import annotations

import asyncio
import gc
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache.lru import (
    LruKeyReplicatedReceiverCache,
    LruKeyReplicatedSenderCache,
)
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.utils.mem_constants import GiB_bytes

from ficoco_server.sent import SentImages, remember_what_is_sent

ROOM = 100_000
"""Bytes that the engine keeps."""


class Engine:
    """A front end's cache and an engine's, and what goes from one to the other."""

    def __init__(self, ours: bool = True) -> None:
        memory = SimpleNamespace(mm_processor_cache_gb=ROOM / GiB_bytes)
        model: Any = SimpleNamespace(get_multimodal_config=lambda: memory)
        self.sender: Any = LruKeyReplicatedSenderCache(model)
        self.receiver = LruKeyReplicatedReceiverCache(model)
        self.core = SimpleNamespace(add_request_async=self._receive)
        if ours:
            renderer = SimpleNamespace(mm_processor_cache=self.sender)
            remember_what_is_sent(SimpleNamespace(renderer=renderer, engine_core=self.core))

    async def _receive(self, request: Any) -> None:
        features = [SimpleNamespace(**vars(feature)) for feature in request.mm_features]
        self.receiver.get_and_update_features(features)  # type: ignore[arg-type]
        assert [f.data["name"].data for f in features] == [f.identifier for f in features]

    def render(self, *images: str, size: int = 1000) -> Any:
        """A request with these images, as vLLM's processor makes it with its cache."""
        names = list(images)
        cached = self.sender.is_cached(names)
        for name in names:
            self.sender.touch_sender_cache_item(name)
        items = [
            self.sender.get_and_update_item(None if hit else (_item(name, size), []), name)[0]
            for name, hit in zip(names, cached, strict=True)
        ]
        self.sender.release_sender_touches()
        return SimpleNamespace(
            mm_features=[
                SimpleNamespace(mm_hash=name, identifier=name, data=item)
                for name, item in zip(names, items, strict=True)
            ]
        )

    def send(self, request: Any) -> None:
        asyncio.run(self.core.add_request_async(request))


def _item(name: str, size: int) -> MultiModalKwargsItem:
    item = MultiModalKwargsItem.dummy(size)
    element = next(iter(item.values()))
    item["name"] = type(element)(data=name, field=element.field)
    return item


def test_a_request_that_is_never_sent_leaves_nothing_behind() -> None:
    engine = Engine()
    refused = engine.render("a", "b")
    again = engine.render("a", "b")  # while the first one is still there
    del refused
    engine.send(again)
    assert [f.data for f in engine.render("a", "b").mm_features] == [None, None], "sent but once"
    engine.render("c")
    gc.collect()
    assert not engine.sender.is_cached_item("c"), "its data are gone with the request"
    engine.send(engine.render("c"))


def test_requests_that_overtake_each_other() -> None:
    engine = Engine()
    first, second = engine.render("a"), engine.render("a")
    engine.send(second)
    engine.send(first)


def test_what_the_engine_has_dropped_is_sent_again() -> None:
    engine = Engine()
    engine.send(engine.render("a"))
    engine.send(engine.render("b", size=ROOM - 2000))
    engine.send(engine.render("a"))
    for size in (2 * ROOM, 10):  # too large to be kept, then not
        engine.send(engine.render("c", size=size))
    engine.send(engine.render("c"))


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_refusals_and_sends(seed: int) -> None:
    """No request ever reaches the engine without data that the engine lacks."""
    engine, choose = Engine(), random.Random(seed)
    sizes = {f"image {n}": choose.choice([500, 1000, 2000]) for n in range(150)}
    waiting: list[Any] = []
    left_out = 0
    for _ in range(1500):
        if len(waiting) < 5 and choose.random() < 0.6:
            names = choose.sample(sorted(sizes), choose.choice([1, 1, 2]))
            waiting.append(engine.render(*names, size=max(sizes[name] for name in names)))
        elif waiting:
            request = waiting.pop(choose.randrange(len(waiting)))
            if choose.random() < 0.7:
                left_out += sum(feature.data is None for feature in request.mm_features)
                engine.send(request)
    assert left_out > 50, "the cache is of use"


def test_a_request_that_cannot_be_sent_has_not_been_sent() -> None:
    aborted: list[list[str]] = []
    outputs = SimpleNamespace(abort_requests=lambda names, internal: aborted.append(names))
    for error, seen in (
        (UnicodeEncodeError("utf-8", "a", 0, 1, "no"), VLLMValidationError),
        (OverflowError("no"), VLLMValidationError),
        (RuntimeError("no"), RuntimeError),
        (asyncio.CancelledError(), asyncio.CancelledError),
    ):
        engine = Engine(ours=False)

        async def fail(_: Any, error: BaseException = error) -> None:
            raise error

        engine.core.add_request_async = fail
        renderer = SimpleNamespace(mm_processor_cache=engine.sender)
        remember_what_is_sent(
            SimpleNamespace(renderer=renderer, engine_core=engine.core, output_processor=outputs)
        )
        request = engine.render("a")
        request.request_id = "1"
        with pytest.raises(seen):
            engine.send(request)
        assert engine.render("a").mm_features[0].data is not None
    assert aborted == [["1"], ["1"]]


def test_a_very_large_image_makes_room_for_itself() -> None:
    engine = Engine()
    engine.send(engine.render("a"))
    engine.send(engine.render("b", size=int(0.9 * ROOM)))
    engine.send(engine.render("a"))


def test_other_caches_stay() -> None:
    class Other(LruKeyReplicatedSenderCache):
        pass

    memory = SimpleNamespace(mm_processor_cache_gb=1)
    cache = Other(SimpleNamespace(get_multimodal_config=lambda: memory))  # type: ignore[arg-type]
    for one in (cache, None):
        renderer = SimpleNamespace(mm_processor_cache=one)
        remember_what_is_sent(SimpleNamespace(renderer=renderer, engine_core=Engine().core))
    assert type(cache) is Other


def test_it_starts_and_clears_as_vllms_does() -> None:
    engine = Engine()
    assert type(engine.sender) is SentImages
    engine.send(engine.render("a"))
    engine.sender.clear_cache()
    engine.receiver.clear_cache()
    engine.send(engine.render("a"))
    assert engine.sender.make_stats().total == 1
    assert torch.is_tensor(next(iter(_item("a", 1).values())).data)
