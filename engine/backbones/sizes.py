"""Arithmetic of feature map sizes."""

from ...data.errors import UsageError


def feature_map_size(image_size: tuple[int, int], halvings: int) -> tuple[int, int]:
    """(height, width) after ``halvings`` 3×3 convolutions of stride 2 and padding 1, each of which makes n into ⌈n/2⌉.

    Raises:
        UsageError: the image has fewer than 2^halvings pixels on a side, so that the last maps would be mostly padding.
    """
    stride = 2**halvings
    if min(image_size) < stride:
        height, width = image_size
        raise UsageError(
            f"images of {height}×{width} pixels are too small for this backbone: it needs {stride}×{stride} or more"
        )
    return -(-image_size[0] // stride), -(-image_size[1] // stride)
