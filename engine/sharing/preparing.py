"""What happens to an image before the network gets it, as the shared files say it, and the same done."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Image | np.ndarray


def preprocessing(image_size: tuple[int, int]) -> dict[str, Any]:
    """What every network of pfc gets, as JSON: RGB, scaled to [-1, 1].

    ``mean`` and ``std`` are of values that ``rescale_factor`` has brought to [0, 1], in the order of the channels.
    """
    height, width = image_size
    return {
        "size": {"height": height, "width": width},
        "resize": "scale to cover the size, bilinear with antialiasing, then crop at the centre",
        "channel_order": "RGB",
        "layout": "NCHW",
        "rescale_factor": 1 / 255,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


def prepare(images: "Picture | Sequence[Picture]", told: Mapping[str, Any]) -> Tensor:
    """Images for the network, float32 [b, 3, H, W].

    Pixels of images that have the size are exactly those that training and evaluation see; others are scaled by Pillow,
    where those scale by DALI, and differ by its rounding.

    Args:
        images: one or several; of Pillow, in any mode, or uint8 arrays, RGB [h, w, 3] or gray [h, w].
        told: as ``preprocessing`` gives it.

    Raises:
        ValueError: an array of another type or shape.
    """
    from PIL import Image, ImageOps

    from ...data.images import to_rgb

    height, width = told["size"]["height"], told["size"]["width"]
    pixels = []
    for image in [images] if isinstance(images, Image.Image | np.ndarray) else images:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
                raise ValueError(
                    f"an image of {image.dtype} {list(image.shape)}: give uint8, RGB [h, w, 3] or gray [h, w], and "
                    "several as a list"
                )
            image = Image.fromarray(image)
        rgb = to_rgb(ImageOps.exif_transpose(image))
        if rgb.size != (width, height):
            rgb = ImageOps.fit(rgb, (width, height), Image.Resampling.BILINEAR)
        pixels.append(np.asarray(rgb))
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(told[name]).view(3, 1, 1) / told["rescale_factor"] for name in ("mean", "std"))
    return (batch - mean) / std
