# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's loading of images and videos: grey in 16 bits, and a 400 for what cannot be
loaded.

Used for all routes that take them, through vLLM's registry of media connectors.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import vllm.envs as envs
from PIL import Image
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, ImageMediaIO, MediaConnector

NAME = "ficoco"
CHOICE = "VLLM_MEDIA_CONNECTOR"
"""vLLM's variable with the name of the connector to use."""


_NO_FRAMES = "no frame of it can be read; send a single one as an image"


def in_8_bits(image: Image.Image, sixteen: bool = False) -> Image.Image:
    """A greyscale image in more than 8 bits as one in 8; any other image as it is.

    Pillow converts these modes to RGB by cutting every value off at 255: an X-ray or a depth map
    in 16 bits comes out white all over, without a word. 16 bits are scaled by their whole range,
    65,535 to 255, as Pillow does with colour. The range of 32 bits, whole numbers or not, is
    unknown: values that are 8-bit ones stay, others are refused.

    Args:
        image: as Pillow opened it.
        sixteen: it has 16 bits also where its mode says 32.

    Raises:
        ValueError: which values it has.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and sixteen):
        wide = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey.putalpha(Image.fromarray((wide != clear).astype(np.uint8) * 255))
        return grey
    if image.mode in ("I", "F"):
        low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
        if not 0 <= low <= high <= 255 or (image.mode == "F" and 0 < high <= 1):
            raise ValueError(
                f"greyscale values from {low:g} to {high:g} in 32 bits have no known range: send "
                "8 or 16 bits"
            )
    return image


class ImageIO(ImageMediaIO):
    """vLLM's decoder of one image, but for greyscale in more than 8 bits."""

    sixteen = False

    def load_bytes(self, data: bytes) -> Any:
        """As vLLM's."""
        # A PGM in 8 bits has mode L; Pillow makes 32 of 16, in their full range.
        self.sixteen = data.startswith((b"P5", b"P2"))
        return super().load_bytes(data)

    def _convert_image_mode(self, image: Any) -> Image.Image:
        return super()._convert_image_mode(in_8_bits(getattr(image, "media", image), self.sixteen))


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class Connector(MediaConnector):
    """vLLM's loader, with our decoder for images.

    Whatever keeps an image or a video from being loaded is the client's to mend, and gets a 400
    with the reason, or a 422 where vLLM says so: also what are 500s of vLLM's, as images too large
    to be decoded, local files, addresses that do not answer, and videos without a frame.
    """

    def _image_io(self, image_mode: str | None) -> ImageIO:
        return ImageIO(**({"image_mode": image_mode} | self.media_io_kwargs.get("image", {})))

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """As vLLM's.

        Raises:
            VLLMClientError: the image cannot be loaded.
        """
        try:
            return self.load_from_url(
                image_url, self._image_io(image_mode), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
        except Exception as error:
            raise _refusal(error, "image") from error

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """As vLLM's.

        Raises:
            VLLMClientError: the image cannot be loaded.
        """
        try:
            return await self.load_from_url_async(
                image_url,
                self._image_io(image_mode),
                fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT,
            )
        except Exception as error:
            raise _refusal(error, "image") from error

    def fetch_video(self, video_url: str, **kwargs: Any) -> Any:
        """As vLLM's.

        Raises:
            VLLMClientError: the video cannot be loaded.
        """
        try:
            return _with_frames(super().fetch_video(video_url, **kwargs))
        except Exception as error:
            raise _refusal(error, "video") from error

    async def fetch_video_async(self, video_url: str, **kwargs: Any) -> Any:
        """As vLLM's.

        Raises:
            VLLMClientError: the video cannot be loaded.
        """
        try:
            return _with_frames(await super().fetch_video_async(video_url, **kwargs))
        except Exception as error:
            raise _refusal(error, "video") from error


def _with_frames(video: Any) -> Any:
    """A loaded video, vLLM's object of frames and metadata.

    Raises:
        ValueError: it has no frames. OpenCV looks for the end of a file first, as vLLM uses it, and
            then does not find the one frame of a file with one.
    """
    frames, _ = video.media
    if not len(frames):
        raise ValueError(_NO_FRAMES)
    return video


def _refusal(error: Exception, modality: str) -> Exception:
    if isinstance(error, VLLMClientError):
        return error
    reason = str(error) or type(error).__name__  # a time-out has no words
    if isinstance(error, ZeroDivisionError):  # Qwen-VL's come in pairs, of which there is none
        reason = _NO_FRAMES
    message = f"The {modality} cannot be loaded: {reason}"
    return VLLMValidationError(message, parameter=f"{modality}_url")


def load_images_with_ours() -> None:
    """Have vLLM use our connector, unless the operator has named another one."""
    os.environ.setdefault(CHOICE, NAME)
