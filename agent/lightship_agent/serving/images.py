"""Serving: images as they are, and the tensor that the manifest makes of them.

Rules:
* raw pixels are UINT8, rows, height, width, channels; PNG and JPEG are elements of a BYTES tensor;
* Pillow opens PNG and JPEG and nothing else, and is loaded when the first one comes; without it raw pixels still do;
* nothing is decoded before its size is known to be bearable: neither the image nor what a request's images become;
* colours are turned into grey and grey into colours as the manifest's channels ask; transparency is dropped, and no
  image is turned by what its metadata say.
"""

from __future__ import annotations

import binascii
import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.tensors import MAX_ELEMENTS, ImageRules, TensorInput

from .tensors import Tensor

MAX_PIXELS: Final = 16 * 1024 * 1024  # of one image
_FORMATS: Final = ("PNG", "JPEG")
#: What 8 bits a channel can be taken from without guessing.
_MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


def image_tensor(tensor: Tensor, declared: TensorInput) -> npt.NDArray[Any]:
    """The declared input that the images in `tensor` become.

    Raises:
        ServingError: serving.input, serving.too-large.
    """
    height, width, channels = declared.size
    rules = declared.image
    assert rules
    if tensor.datatype == "BYTES":
        many = len(tensor.data)
        if tensor.shape not in ((many,), (many, 1)):
            message = f"{tensor.name!r}: expected encoded images in shape [rows], found {list(tensor.shape)}."
            raise ServingError("serving.input", message)
        _check_room(tensor.name, many * height * width * channels)
        images = [_decoded(tensor.name, i, data, declared, rules) for i, data in enumerate(tensor.data)]
        pixels = np.stack(images) if images else np.empty((0, height, width, channels), np.uint8)
    else:
        pixels = _raw(tensor, declared, rules)
    return normalised(pixels, declared, rules)


def normalised(pixels: npt.NDArray[np.uint8], declared: TensorInput, rules: ImageRules) -> npt.NDArray[Any]:
    """uint8 `[n, height, width, channels]` as the declared tensor."""
    found: npt.NDArray[Any] = pixels
    if declared.datatype == "FP32":
        found = pixels.astype(np.float32) * np.float32(rules.scale)
        if rules.mean:
            found -= np.array(rules.mean, dtype=np.float32)
        if rules.std:
            found /= np.array(rules.std, dtype=np.float32)
    if rules.layout == "NCHW":
        found = found.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(found)


def _raw(tensor: Tensor, declared: TensorInput, rules: ImageRules) -> npt.NDArray[np.uint8]:
    height, width, channels = declared.size
    shape = tensor.shape if len(tensor.shape) == 4 else (1, *tensor.shape)
    is_pixels = tensor.datatype == "UINT8" and isinstance(tensor.data, np.ndarray)
    if not is_pixels or len(shape) != 4 or shape[3] != channels or tensor.data.size != np.prod(shape):
        message = (
            f"{tensor.name!r} is an image: expected UINT8 [rows, {height}, {width}, {channels}], or PNG or JPEG in "
        )
        message += f"BYTES [rows]; found {tensor.datatype[:16]} {list(tensor.shape)}."
        raise ServingError("serving.input", message)
    pixels: npt.NDArray[np.uint8] = tensor.data.reshape(shape).astype(np.uint8, copy=False)
    if shape[1:3] == (height, width):
        return pixels
    if rules.resize == "no":
        raise _size(repr(tensor.name), (shape[2], shape[1]), (width, height))
    _check_room(tensor.name, shape[0] * height * width * channels)
    library = _library()
    mode = "RGB" if channels == 3 else "L"
    images = [library.fromarray(one if channels == 3 else one[:, :, 0]).convert(mode) for one in pixels]
    return np.stack([_sized(library, image, declared, rules) for image in images])


def _decoded(name: str, index: int, data: Any, declared: TensorInput, rules: ImageRules) -> npt.NDArray[np.uint8]:
    if isinstance(data, str):  # as JSON carries bytes
        try:
            data = binascii.a2b_base64(data, strict_mode=True)
        except (binascii.Error, ValueError) as e:
            message = f"{name!r}, image {index}: expected base64 of a PNG or JPEG: {e}."
            raise ServingError("serving.input", message) from e
    library = _library()
    try:
        with library.open(io.BytesIO(data or b""), formats=_FORMATS) as image:
            _check_image(f"{name!r}, image {index}", image, declared, rules)
            plain = image.convert("RGB" if declared.size[2] == 3 else "L")
        return _sized(library, plain, declared, rules)
    except ServingError:
        raise
    except Exception as e:  # a broken file raises what its decoder likes: OSError, SyntaxError, struct.error …
        raise ServingError("serving.input", f"{name!r}, image {index}: expected a PNG or JPEG: {e}.") from e


def _check_image(what: str, image: Any, declared: TensorInput, rules: ImageRules) -> None:
    """Refuse an image of which only the header has been read."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        message = f"{what}: expected at most {MAX_PIXELS} pixels, found {width} × {height}."
        raise ServingError("serving.too-large", message)
    if image.mode not in _MODES:
        raise ServingError("serving.input", f"{what}: expected 8 bits a channel, found mode {image.mode!r}.")
    if rules.resize == "no" and (height, width) != declared.size[:2]:
        raise _size(what, (width, height), declared.size[1::-1])


def _sized(library: Any, image: Any, declared: TensorInput, rules: ImageRules) -> npt.NDArray[np.uint8]:
    height, width, channels = declared.size
    if image.size != (width, height):
        box = None
        if rules.resize == "crop":
            # The part with the wanted proportions, in the middle.
            share = min(image.size[0] / width, image.size[1] / height)
            left, top = (image.size[0] - share * width) / 2, (image.size[1] - share * height) / 2
            box = (left, top, left + share * width, top + share * height)
        image = image.resize((width, height), library.Resampling.BILINEAR, box=box)
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def _check_room(name: str, elements: int) -> None:
    if elements > MAX_ELEMENTS:
        message = f"{name!r}: the images become {elements} numbers; expected at most {MAX_ELEMENTS} in one request."
        raise ServingError("serving.too-large", message)


def _size(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ServingError:
    message = f"{what}: expected an image of {expected[0]} × {expected[1]}, found {found[0]} × {found[1]}."
    return ServingError("serving.input", message)


def _library() -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        message = "This agent can't decode or resize images: Pillow is not installed."
        remedy = "Install lightship-agent[images], or send raw UINT8 pixels of the declared size."
        raise ServingError("serving.input", message, remedy=remedy) from e
    return Image
