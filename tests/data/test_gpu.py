"""Pictures decoded and augmented on a GPU are the CPU's, to rounding; ``make test-gpu`` runs it (docs/devices.md)."""

from pathlib import Path
from typing import Any

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="the pictures are made with Pillow")
pytest.importorskip("pydantic", reason="augmentations are described with pydantic")
pytest.importorskip("nvidia.dali", reason="pictures are decoded by NVIDIA DALI")

from tests.data.loading.test_augment import ALL
from tests.data.pictures import SIZE, collect, encode, pack, picture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
GPU = torch.device("cuda")


@pytest.mark.parametrize("place", ["cpu", "gpu"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_gpu_sees_the_pictures_that_the_cpu_sees(form: str, place: Any, tmp_path: Path) -> None:
    smooth = [np.asarray(Image.fromarray(picture(i, (3, 3))).resize(SIZE[::-1])) for i in range(53)]
    dataset = pack(tmp_path / "set", [encode(image, form) for image in smooth])
    on_cpu = collect(dataset, steps=9, batch_size=6)
    on_gpu = collect(dataset, steps=9, batch_size=6, device=GPU, decode=place)
    assert on_gpu[0].is_cuda
    assert on_gpu[1].is_cuda
    # A step of 8 bits is 0.008: the two decoders round otherwise, and convert colours after that.
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0], atol=0.0 if place == "cpu" else 0.04, rtol=0)
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])


def test_a_gpu_augments_as_the_cpu_does(tmp_path: Path) -> None:
    noise = pack(tmp_path / "noise", [encode(picture(number)) for number in range(40)])
    on_cpu, _ = collect(noise, 3, 8, augment=ALL)
    on_gpu, _ = collect(noise, 3, 8, augment=ALL, device=GPU, decode="gpu")
    assert (on_cpu - on_gpu.cpu()).abs().mean() < 0.02, "the decoders and filters round differently"
