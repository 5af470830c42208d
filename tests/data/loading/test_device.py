"""Every call that only a machine with a GPU makes, held against the signature that DALI and torch really have."""

import inspect
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU

from pfc.data.errors import UsageError
from pfc.data.loading.augment import Augment
from pfc.data.loading.dali import as_batch, build_pipeline, run_pipeline, undecodable
from pfc.data.loading.decoding import decode_images
from pfc.data.loading.loader import TrainLoader
from pfc.data.records.dataset import RecordDataset
from tests.data.pictures import SIZE, as_tensor, encode, pack, picture

GPU = torch.device("cuda", 1)
EVERYTHING = Augment.model_validate({name: {"probability": 0.5} for name in Augment.model_fields})


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch's current stream on a GPU, as far as DALI looks at one."""
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", create_autospec(torch.cuda.current_stream, return_value=stream))
    return stream


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors that were brought into pinned memory, which only a machine with a GPU has."""
    seen: list[torch.Tensor] = []

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        seen.append(self)
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return seen


def built(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> tuple[Any, Mock]:
    """The pipeline with every augmentation, its operators traced and checked by DALI; and the calls of its decoder."""
    decoder = Mock(wraps=fn.decoders.image)
    monkeypatch.setattr(fn.decoders, "image", decoder)
    monkeypatch.setattr(Pipeline, "build", create_autospec(Pipeline.build))  # which would ask for the GPU
    pipeline = build_pipeline(
        lambda: [], batch_size=4, image_size=SIZE, resize=True, device=device, threads=2, drawn=EVERYTHING.drawn
    )
    pipeline._build_graph()
    return pipeline, decoder


def test_dali_gets_the_stream_as_its_signature_takes_it(stream: SimpleNamespace) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    pipeline = create_autospec(Pipeline, instance=True)
    pipeline.run.return_value = (TensorListCPU(values),)
    tensor = run_pipeline(pipeline, GPU)
    call = pipeline.run.call_args
    bound = inspect.signature(Pipeline.run).bind(pipeline, *call.args, **call.kwargs).arguments
    assert bound.get("pipeline_inputs", {}) == {}, "by name it is an input of the pipeline"
    assert bound["cuda_stream"] is stream
    assert types._raw_cuda_stream_ptr(stream).value == 7
    assert torch.equal(tensor, torch.from_numpy(values))
    assert not np.shares_memory(tensor.numpy(), values), "a copy: torch's allocator does not know DALI's memory"


def test_the_cpu_takes_the_same_calls() -> None:
    pipeline = create_autospec(Pipeline, instance=True)
    pipeline.run.return_value = (TensorListCPU(np.ones((2, 2), dtype=np.float32)),)
    run_pipeline(pipeline, torch.device("cpu"))
    pipeline.run.assert_called_once_with(None)


@pytest.mark.parametrize("device", [GPU, torch.device("cpu")], ids=str)
def test_the_pipeline_is_one_that_keeps_its_outputs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, decoder = built(monkeypatch, device)
    assert pipeline.exec_dynamic is True, "streams and outputs that outlive the next run need it"
    assert pipeline.device_id == device.index
    assert decoder.call_args.kwargs == {
        "device": "mixed" if device == GPU else "cpu",
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
        "hw_decoder_load": 1.0,  # a share would make a picture depend on its place in the batch
    }


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = create_autospec(torch.accelerator.current_device_index, return_value=3)
    monkeypatch.setattr(torch.accelerator, "current_device_index", current)
    assert built(monkeypatch, torch.device("cuda"))[0].device_id == 3


def test_a_gpus_decoder_gets_each_image_alone(tmp_path: Any) -> None:
    dataset = pack(tmp_path / "set", [encode(picture(i)) for i in range(6)])
    images = [dataset.read(i)[1] for i in range(3)]
    batch = as_batch(images, GPU)
    assert [np.asarray(batch[i]).tobytes() for i in range(3)] == [image.tobytes() for image in images]


def test_bad_images_are_looked_for_on_the_gpu_that_met_them(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Mock(wraps=fn.decoders.image)
    monkeypatch.setattr(fn.decoders, "image", decoder)
    monkeypatch.setattr(Pipeline, "build", create_autospec(Pipeline.build))
    runs = create_autospec(Pipeline.run, side_effect=[None, RuntimeError("no image"), None])
    monkeypatch.setattr(Pipeline, "run", runs)
    images = [np.frombuffer(encode(picture(i)), dtype=np.uint8) for i in range(3)]
    assert undecodable(images, GPU) == [1]
    assert {call.kwargs["device"] for call in decoder.call_args_list} == {"mixed"}
    assert {call.args[0].device_id for call in runs.call_args_list} == {1}


@pytest.fixture
def dataset(tmp_path: Any) -> RecordDataset:
    return pack(tmp_path / "set", [encode(picture(i), "JPEG") for i in range(26)])


def test_a_gpus_run_decodes_on_the_cpu_and_copies(dataset: RecordDataset, pinned: list[torch.Tensor]) -> None:
    """The meta device stands for the card: what was pinned is what would be copied there."""
    options: dict[str, Any] = {"batch_size": 6, "image_size": SIZE, "augment": EVERYTHING}
    here, there = TrainLoader(dataset, **options), TrainLoader(dataset, device=torch.device("meta"), **options)
    for _ in range(5):
        expected, batch = next(here), next(there)
        assert batch.images.device.type == batch.labels.device.type == "meta"
        images, labels = pinned
        assert torch.equal(images, expected.images)
        assert torch.equal(labels, expected.labels)
        pinned.clear()
    here.close()
    there.close()


def test_evaluation_decodes_on_the_cpu_and_copies(pinned: list[torch.Tensor]) -> None:
    pictures = [picture(i) for i in range(5)]
    options: dict[str, Any] = {"image_size": SIZE, "batch_size": 3, "device": torch.device("meta")}
    tensors = list(decode_images([encode(p) for p in pictures], **options))
    assert [tensor.device.type for tensor in tensors] == ["meta", "meta"]
    torch.testing.assert_close(torch.cat(pinned), torch.stack([as_tensor(p) for p in pictures]))


def test_decoding_on_a_gpu_needs_one(dataset: RecordDataset) -> None:
    with pytest.raises(UsageError, match=r"data\.decode: gpu needs an NVIDIA GPU.* cpu: write data\.decode: cpu"):
        TrainLoader(dataset, batch_size=2, image_size=SIZE, decode="gpu")
