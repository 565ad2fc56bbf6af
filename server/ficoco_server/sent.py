# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's cache of what the engine has: an image counts once it was really sent.

vLLM keeps an image's data from being sent twice: its front end remembers what the engine holds,
and leaves the data out the next time. But it remembers when a prompt has been *rendered*. Where the
request is then refused, or its client leaves, the engine never gets the data; the next request with
the same image and settings is sent without them, and ends in an error ("P0/P1 cache drift"). So it
may where two requests with one image overtake each other.

Here the front end remembers when a request is *sent*. Until then whoever renders the same image
gets the data, too, as long as some request still holds them; of one that is gone, nothing is kept.
Requests arrive at the engine in the order in which they were sent, and with their images we do
just what it does, in a cache that is somewhat smaller: what is in ours is in the engine's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.multimodal.cache.base import (
    MultiModalCache,
    MultiModalProcessorCacheItemMetadata,
    MultiModalProcessorCacheOutItem,
)
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.cache.shm import ShmObjectStoreSenderCache
from vllm.utils.cache import LRUCache

logger = init_logger(__name__)

SHARE = 0.75
"""Of the size of the engine's cache, how much ours has. An image that is found here must still be
there when its request arrives, whatever other requests are sent in between."""


class Rendered(MultiModalProcessorCacheItemMetadata):
    """What stays of an image that was rendered: vLLM's own, and where its data are."""

    def __init__(self, item: Any, prompt_updates: Any) -> None:
        super().__init__(item, prompt_updates)
        self.data = weakref.ref(item)


class SentImages(LruKeyReplicatedSenderCache):
    """vLLM's cache in the front end; :func:`remember_what_is_sent` makes it of one that is in use.

    Images are rendered in a thread of their own, one prompt at a time, and sent by the event loop.
    """

    _cache: LRUCache[str, Rendered]

    def begin(self) -> None:
        """Forget what was rendered so far, and start to remember what is sent."""
        self._lock = threading.Lock()
        self._sent: LRUCache[str, int] = LRUCache(SHARE * self._cache.maxsize, getsizeof=int)
        self._promised: dict[str, Any] = {}
        self._cache.clear()

    def sent(self, features: Sequence[Any]) -> None:
        """A request leaves for the engine: do with its images what the engine will do.

        Args:
            features: vLLM's, of all images of the request.
        """
        with self._lock:
            for feature in features:
                self._sent.touch(_name(feature))
            for feature in features:
                name = _name(feature)
                if feature.data is None:
                    self._sent.get(name)
                else:
                    self._sent.pop(name)
                    size = self._size(name, feature.data)
                    if not self._sent.put_if_fits(name, size):
                        self._sent.clear()  # the engine may have made room for it

    def _size(self, name: str, data: Any) -> int:
        """Of an image's data, as the engine counts it. When it was rendered, vLLM has counted."""
        if name in self._cache:
            return self._cache.__getitem__(name, update_info=False).item_size
        return MultiModalCache.get_item_size(data)

    def is_cached_item(self, mm_hash: str) -> bool:
        """Whether an image need not be rendered: the engine or another request has its data."""
        with self._lock:
            if mm_hash not in self._cache:
                return False
            data = self._cache.__getitem__(mm_hash, update_info=False).data()
            if data is not None:
                self._promised[mm_hash] = data  # or it could be gone when it is asked for
            return data is not None or mm_hash in self._sent

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> MultiModalProcessorCacheOutItem:
        with self._lock:
            known = self._cache.get(mm_hash)
            if known is not None:
                if mm_hash in self._sent:
                    return None, known.prompt_updates
                data = self._promised.get(mm_hash) or known.data()
                if data is not None or mm_item is None:
                    return data, known.prompt_updates
            assert mm_item is not None, f"no data of an image that is not known: {mm_hash}"
            self._cache.pop(mm_hash)
            self.cache_if_fits(self._cache, mm_hash, Rendered(*mm_item))
            return tuple(mm_item)

    def release_sender_touches(self) -> None:
        """The prompt is rendered, and holds what it was promised."""
        with self._lock:
            self._promised.clear()

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        with self._lock:
            super().touch_sender_cache_item(mm_hash)

    def clear_cache(self) -> None:
        with self._lock:
            super().clear_cache()
            self._sent.clear()

    def invalidate(self, mm_hash: str) -> None:
        with self._lock:
            super().invalidate(mm_hash)
            self._sent.pop(mm_hash)


def _name(feature: Any) -> str:
    """Under which name the engine keeps an image."""
    name: str = feature.mm_hash or feature.identifier
    return name


def remember_what_is_sent(engine_client: Any) -> None:
    """Make the front end of an engine remember an image when it is sent, not when it is rendered.

    The cache is given our class, and not replaced, because vLLM's output handler already holds it.
    Where there is none, or several front ends have each their own, data are always sent. That in
    shared memory (``--mm-processor-cache-type shm``) stays as it is, with what README says of it.

    What cannot be encoded, such as half a surrogate pair among the stop strings, is found when a
    request is sent. It is the client's to mend, and a 500 of vLLM's.
    """
    cache, core = engine_client.renderer.mm_processor_cache, engine_client.engine_core
    if type(cache) is LruKeyReplicatedSenderCache:
        cache.__class__ = SentImages
        cache.begin()
    elif isinstance(cache, ShmObjectStoreSenderCache):
        logger.warning("In shared memory, images of refused requests keep their room for good.")
    send = core.add_request_async

    async def add_request_async(request: Any) -> None:
        features = request.mm_features or ()
        if isinstance(cache, SentImages):
            cache.sent(features)
        try:
            await send(request)
        except BaseException as error:
            for feature in features if isinstance(cache, SentImages) else ():
                cache.invalidate(_name(feature))
            if not isinstance(error, ValueError | TypeError | OverflowError):
                raise
            engine_client.output_processor.abort_requests([request.request_id], internal=True)
            raise VLLMValidationError(
                f"The request has a value that cannot be sent to the engine: {error}"
            ) from error

    core.add_request_async = add_request_async
