"""The head where numbers are large, small, zero or of half precision."""

import contextlib

import pytest
import torch

from pfc.partial_fc import PartialFC, objectives
from pfc.partial_fc.kernels import products
from pfc.partial_fc.kernels.products import ComputeDtype, products_in, rounds_to_bfloat16
from tests.partial_fc.cases import OBJECTIVES, Case, check, dense_row_gradient, relative_error


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_products_stay_close(name: str) -> None:
    exact, rounded = (_one_step(name, compute_dtype) for compute_dtype in (torch.float32, torch.bfloat16))
    for value, reference in zip(rounded, exact, strict=True):
        error = relative_error(value, reference.double())
        assert error < 0.1
        # Zero, where this processor makes them in float32; more, where they really are bfloat16's.
        assert (error > 0) == rounds_to_bfloat16(torch.device("cpu"))


def test_whether_products_round_is_measured_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_set", lambda *_: contextlib.nullcontext())  # nobody follows the permission
    assert not rounds_to_bfloat16.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(products, "operand_dtype", lambda dtype, device: dtype)  # what a GPU is given
    assert rounds_to_bfloat16.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(("dim", "num_classes"), [(8, 9001), (64, 50_000), (512, 20_000)])
def test_p2sgrad_keeps_its_digits_over_many_classes(gram: bool, dim: int, num_classes: int) -> None:
    """Its sum over the classes is √(K/D) times longer along the embedding than across, and only the latter stays: of
    float32's 6·10⁻⁸ that makes 2·10⁻⁶ (K/D ≈ 1,000); a sum in float32 throughout loses thirty times more."""
    check([Case("p2sgrad", {"gram": gram}, num_classes=num_classes, dim=dim)], 1, tolerance=5e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tf32_is_float32_on_a_cpu(name: str) -> None:
    for value, expected in zip(_one_step(name, "tf32"), _one_step(name, torch.float32), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("asked", "set_to"), [("tf32", "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "ieee"), (torch.float64, "ieee")]
)
def test_a_gpus_products_are_set_for_the_head_alone(asked: ComputeDtype, set_to: str) -> None:
    """Whatever the trainer has set for its own products comes back."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for outside in ("tf32", "ieee"):
            settings.fp32_precision = outside
            with products_in(asked, torch.device("cuda")):
                assert settings.fp32_precision == set_to
            assert settings.fp32_precision == outside
    finally:
        settings.fp32_precision = before


def _one_step(name: str, compute_dtype: ComputeDtype) -> tuple[torch.Tensor, torch.Tensor]:
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
        check([case], world_size)


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
