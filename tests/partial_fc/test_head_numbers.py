"""The head where numbers are large, small, zero or of half precision."""

from pathlib import Path

import pytest
import torch

from pfc.partial_fc import PartialFC, objectives
from tests.partial_fc.cases import OBJECTIVES, Case, check, dense_row_gradient, relative_error

# A CPU without these multiplies in float32.
CPU = Path("/proc/cpuinfo")


BF16_UNITS = bool({"amx_bf16", "avx512_bf16"} & set(CPU.read_text().split() if CPU.exists() else []))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_products_stay_close(name: str) -> None:
    exact, rounded = (_one_step(name, compute_dtype) for compute_dtype in (torch.float32, torch.bfloat16))
    for value, reference in zip(rounded, exact, strict=True):
        error = relative_error(value, reference.double())
        assert error < 0.1
        assert error > 0 or not BF16_UNITS  # none: the products would not be bfloat16's


def _one_step(name: str, compute_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    head = PartialFC(200, 64, objective=objectives.build(name, **OBJECTIVES[name]), compute_dtype=compute_dtype)
    embeddings = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    head(embeddings, torch.arange(16)).backward()
    assert embeddings.grad is not None
    return embeddings.grad, dense_row_gradient(head)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [64.0, 128.0, 256.0])
def test_cosines_at_exactly_plus_and_minus_one_are_finite(name: str, scale: float) -> None:
    parameters = OBJECTIVES[name] | ({"scale": scale} if "scale" in OBJECTIVES[name] else {})
    head = PartialFC(3, 4, objective=objectives.build(name, **parameters))
    head.load_centers(torch.eye(3, 4))
    embeddings = torch.tensor([[2.0, 0, 0, 0], [0, -3.0, 0, 0], [0, 0, 0, 1.0]], requires_grad=True)
    loss = head(embeddings, torch.tensor([0, 1, 2]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(dense_row_gradient(head)).all()
    # At ±1 the part of the center at right angles to the embedding is zero, and no slope makes a pull of it.
    assert embeddings.grad[0, 0] == 0
    assert embeddings.grad[1, 1] == 0


def test_scale_256_is_exact_where_the_logits_are_largest() -> None:
    case = Case("cosface", {"scale": 256.0, "margin": 0.4}, num_classes=50, dim=3, dtype=torch.float64)
    for world_size in (1, 2, 3):
        check(case, world_size)


def test_an_embedding_of_zeros_has_a_defined_loss_and_no_gradient() -> None:
    head = PartialFC(10, 4, objective=objectives.Softmax(scale=16.0))
    embeddings = torch.stack([torch.zeros(4), torch.ones(4)]).requires_grad_()
    loss = head(embeddings, torch.tensor([1, 2]))
    loss.backward()
    assert torch.isfinite(loss)
    assert (embeddings.grad[0] == 0).all()
    assert (embeddings.grad[1] != 0).any()
    assert torch.isfinite(dense_row_gradient(head)).all()


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-12, 1e-9])
def test_very_short_centers_have_finite_gradients(length: float) -> None:
    head = PartialFC(10, 4, objective=objectives.Softmax(scale=64.0))
    head.weight.data[3] = torch.tensor([length, 0, 0, 0])
    embeddings = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]], requires_grad=True)
    loss = head(embeddings, torch.tensor([1, 3]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(dense_row_gradient(head)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_get_gradients_of_their_own_type(dtype: torch.dtype) -> None:
    head = PartialFC(10, 8, objective=objectives.CosFace())
    embeddings = torch.randn(4, 8).to(dtype).requires_grad_()
    loss = head(embeddings, torch.arange(4))
    loss.backward()
    assert loss.dtype == torch.float32
    assert embeddings.grad.dtype == dtype
    assert torch.isfinite(embeddings.grad).all()
