"""The reductions in one pass over the rows, a block at a time that stays in the cache: the CPU's fast way.

The pass reads a block of stored centers once. In the cache it measures their norms, multiplies with the embeddings,
takes p = exp(scale·z), and adds to both sums that the step needs: Σ p, and U = Σ p·ŵ, from which ∂loss/∂unit follows
without a second pass, since ∂ℓ/∂x̂ = scale·U/Σp. Of another sum Σ f(z), p is f′(z). The rows' gradients are computed
block by block in the row update, from the stored p or, where p would not fit ``keep_bytes``, from p recomputed by
the same product.

Counted for K rows: with p stored 6·B·K·D operations, K·D read once here and once by the optimizer, B·K written and
read; with p recomputed 8·B·K·D, and nothing of size B·K anywhere.
"""

import copy
from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from . import Once, native
from .probabilities import LogSumExpReduction, Reduction, SoftplusReduction
from .products import ComputeDtype, operand_dtype, products_in, summed_at_once
from .rows import OwnClasses, SampledRows, block_rows


class ReductionBlocked(Reduction):
    """A reduction of any kind; ``reduce_products`` says which."""

    def forward(self, unit: Tensor, rows: SampledRows, own: OwnClasses, *, backward: bool) -> Tensor:
        powers = _Powers(self, unit, rows, own, keep=backward)
        total = torch.zeros(self.sums, len(unit), dtype=torch.float64, device=unit.device)
        weighted = unit.new_zeros(unit.shape, dtype=torch.float64 if self.nearly_radial else unit.dtype)  # U, [B, D]
        size = self._block_rows(unit)
        buffer = unit.new_empty(min(size, len(rows)), unit.shape[1]) if rows.copies else None
        for start in range(0, len(rows), size):
            stop = min(start + size, len(rows))
            block = rows.measure(start, stop, buffer).to(powers.dtype)
            power = powers.make(start, stop, block, total)
            if not backward:
                continue
            with products_in(self.compute_dtype, unit.device):
                if weighted.dtype == powers.dtype:
                    weighted.addmm_(power.T, block)
                else:
                    weighted += power.T @ block
        if backward:
            self.saved.keep(powers, weighted)
        return total

    def _block_rows(self, unit: Tensor) -> int:
        size = block_rows(unit, sub_centers=self.sub_centers)
        if self.nearly_radial:
            size = max(1, min(size, summed_at_once(unit.shape[1])) // self.sub_centers) * self.sub_centers
        return size

    @abstractmethod
    def reduce_products(self, products: Tensor, inverse: Tensor, own: tuple[Tensor, Tensor], total: Tensor) -> None:
        """In place, from w·x̂ to p/‖w‖, and the sums over the rows: the one pass over the products of a block.

        Args:
            products: w·x̂ [n, B] of stored rows with normalised embeddings; p/‖w‖ when it returns, 0 for each sample's
                own class and for all but the nearest of a class's rows.
            inverse: 1/‖w‖ [n, 1].
            own: the own classes' places among the block's classes and in the batch, int64 [m] each.
            total: float64 [S, B], to which the sums over the rows are added.
        """

    def _leave_out(self, products: Tensor, inverse: Tensor | None, own: tuple[Tensor, Tensor]) -> None:
        """Sets to −∞ what is no negative; ``inverse`` where the products are no cosines yet."""
        classes = products.view(-1, self.sub_centers, products.shape[1])
        if self.sub_centers > 1:
            cosines = classes if inverse is None else classes * inverse.view(-1, self.sub_centers, 1)
            every = torch.arange(self.sub_centers, device=products.device)[:, None]
            classes.masked_fill_(every != cosines.argmax(dim=1, keepdim=True), -torch.inf)
        if len(own[0]):
            classes.transpose(1, 2)[own] = -torch.inf


class LogSumExpBlocked(LogSumExpReduction, ReductionBlocked):
    """The same numbers as ``cosines.LogSumExp``."""

    def reduce_products(self, products: Tensor, inverse: Tensor, own: tuple[Tensor, Tensor], total: Tensor) -> None:
        if native.supports(products):
            self._leave_out(products, inverse, own)
            native.exponentials(products, inverse, self.scale, self._compiled_hard, total[0])
            return
        products.mul_(inverse)
        self._leave_out(products, None, own)
        slope: Tensor | float = 1.0
        if self.hard is not None and self.shift is not None:
            cosines, slope = self.hard.transform(products)
            torch.sub(cosines * self.scale, self.shift.to(products.dtype), out=products)
        else:
            products.mul_(self.scale)
        products.exp_()
        total[0] += products.sum(dim=0)
        products.mul_(slope).mul_(inverse)

    @cached_property
    def _compiled_hard(self) -> tuple[Tensor, list[float]] | None:
        """As ``native.exponentials`` takes them."""
        if self.hard is None or self.shift is None:
            return None
        return self.hard.threshold.float().contiguous(), [*self.hard.numbers[:4].tolist(), float(self.shift)]


class SumOfSoftplusBlocked(SoftplusReduction, ReductionBlocked):
    """Σ softplus(scale·g(z) + shift) over the negatives."""

    def reduce_products(self, products: Tensor, inverse: Tensor, own: tuple[Tensor, Tensor], total: Tensor) -> None:
        products.mul_(inverse)
        self._leave_out(products, None, own)
        there = products > -torch.inf
        losses, probabilities, slopes = self.terms(products)
        total[0] += torch.where(there, losses, 0.0).sum(dim=0)
        total[1] += torch.where(there, probabilities, 0.0).sum(dim=0)
        products.copy_(torch.where(there, slopes * inverse, 0.0))


class _Powers:
    """p/‖w‖ [K, B] of the negatives, by blocks; and from it (∂loss/∂ŵ)/‖w‖ = p/‖w‖ · (coefficient·unit)."""

    def __init__(
        self, kernel: ReductionBlocked, unit: Tensor, rows: SampledRows, own: OwnClasses, *, keep: bool
    ) -> None:
        self.kernel = copy.copy(kernel)  # which keeps these powers: a circle would keep their memory
        self.kernel.saved = Once()
        self.unit, self.rows, self.own = unit, rows, own
        self.compute_dtype: ComputeDtype = kernel.compute_dtype
        self.dtype = operand_dtype(kernel.compute_dtype, unit.device)
        self.columns = unit.to(self.dtype).T.contiguous()  # [D, B]
        self.kept = kernel.budget.keep(unit, len(rows), self.dtype) if keep else None
        size = min(block_rows(unit, sub_centers=kernel.sub_centers), len(rows))
        self.needs_rows = self.kept is None
        in_place = self.kept is not None and self.dtype == unit.dtype
        self.scratch = None if in_place else unit.new_empty(size, len(unit))
        self.gradients = unit.new_empty(size, unit.shape[1], dtype=self.dtype)
        self.weighted_unit: Tensor | None = None

    def make(self, start: int, stop: int, block: Tensor, total: Tensor) -> Tensor:
        """p/‖w‖ of the places [start, stop), [n, B], in the products' dtype; the sums are added to ``total`` [S, B].

        Args:
            block: the stored rows there [n, D], in the products' dtype.
        """
        kept = None if self.kept is None else self.kept[start:stop]
        products = kept if self.scratch is None else self.scratch[: stop - start]
        assert products is not None
        with products_in(self.compute_dtype, self.unit.device):
            if products.dtype == self.dtype:
                torch.mm(block, self.columns, out=products)
            else:
                products.copy_(block @ self.columns)
        first, last = start // self.kernel.sub_centers, stop // self.kernel.sub_centers
        here = self.own.within(first, last) or slice(0, 0)
        own = self.own.places[here] - first, self.own.samples[here]
        self.kernel.reduce_products(products, self.rows.inverse[start:stop], own, total)
        if kept is None or kept is products:
            return products.to(self.dtype)
        return kept.copy_(products)

    def weight_unit(self, coefficient: Tensor) -> None:
        self.weighted_unit = (coefficient * self.unit.double()).to(self.dtype)

    def block(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        assert self.weighted_unit is not None
        if self.kept is not None:
            power = self.kept[start:stop]
        else:
            assert rows is not None
            unused = self.unit.new_zeros(self.kernel.sums, len(self.unit), dtype=torch.float64)
            power = self.make(start, stop, rows.to(self.dtype), unused)
        small = stop - start <= len(self.gradients)
        with products_in(self.compute_dtype, self.unit.device):
            product = torch.mm(power, self.weighted_unit, out=self.gradients[: stop - start] if small else None)
        return product.to(self.unit.dtype)
