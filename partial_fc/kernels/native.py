"""The compiled passes of ``native.c`` on a CPU, in float32, over rows of float32 or bfloat16; without them torch's own
operations do the same.

They are compiled when pfc is installed, if a C compiler is there: once for every kind of processor that ``VARIANTS``
names, and the best that this one can run is taken. ``None`` in place of a library is an ordinary state: no compiler, no
installation (the folder alone), another platform.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .rounding import Rounding
from .row_step import RowStep

# What torch calls a processor's abilities → the suffix of the file compiled for it; best first (setup.py builds them).
VARIANTS = {"AVX512": "_v4", "AVX2": "_v3", "DEFAULT": ""}
_VERSION = 3  # pfc_native_version of native.c
_FEWEST_ROWS = 64  # of a thread; fewer are not worth waking it


class _Matrix(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class _Rounding(ctypes.Structure):
    _fields_ = [("ids", ctypes.c_void_p), ("first", ctypes.c_int64), ("key", ctypes.c_uint32)]


class _Hard(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("square", "slope", "constant", "sine", "shift")]


_POINTER, _INT, _FLAG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
)  # fmt: skip
_STEP = [ctypes.POINTER(_Matrix), _POINTER, _INT, _INT, _POINTER, _POINTER, _FLOAT, _Rounding, _FLAG]
_SIGNATURES: dict[str, list[type]] = {
    "pfc_copy_rows": [_Matrix, _POINTER, _Matrix, _POINTER, _INT, _INT],
    "pfc_will_need": [_Matrix, _POINTER, _INT, _INT],
    "pfc_measure_rows": [_Matrix, _POINTER, _INT, _INT, _POINTER, _POINTER, _FLAG],
    "pfc_exponentials": [_POINTER, _POINTER, _INT, _INT, _FLOAT, _POINTER, _Hard, _POINTER, _POINTER],
    "pfc_sgd": [*_STEP, *[_FLOAT] * 3, _FLAG],
    "pfc_adamw": [*_STEP, *[_DOUBLE] * 3, _FLOAT, _DOUBLE],
    "pfc_adagrad": [*_STEP, *[_FLOAT] * 3],
}


@cache
def passes() -> ctypes.CDLL | None:
    """The compiled passes, or None where this installation has none or PFC_COMPILED is 0."""
    if os.environ.get("PFC_COMPILED") == "0":
        return None
    abilities = list(VARIANTS)
    x86 = os.uname().machine in ("x86_64", "AMD64")
    ability = torch.backends.cpu.get_cpu_capability() if x86 else "DEFAULT"
    able = abilities.index(ability if ability in abilities else "DEFAULT")
    for suffix in list(VARIANTS.values())[able:]:
        for path in sorted(Path(__file__).parent.glob(f"_native{suffix}.*so")):
            try:
                loaded = ctypes.CDLL(str(path))
            except OSError:  # compiled elsewhere
                continue
            if loaded.pfc_native_version() != _VERSION:
                continue
            for name, arguments in _SIGNATURES.items():
                function = getattr(loaded, name)
                function.argtypes, function.restype = arguments, None
            return loaded
    return None


def supports(matrix: Tensor) -> bool:
    """Whether rows of this matrix can be walked by the compiled passes."""
    known = matrix.device.type == "cpu" and matrix.dtype in (torch.float32, torch.bfloat16)
    return known and matrix.stride(-1) == 1 and passes() is not None


def measure_rows(
    matrix: Tensor, index: Tensor | None, start: int, stop: int, out: Tensor | None, inverse: Tensor
) -> None:
    """Inverse norms of the rows at the places [start, stop), and where asked the rows themselves.

    Args:
        matrix: [N, D] float32 or bfloat16.
        index: places in the matrix, int64 [K], of which those of [start, stop) are walked; None for the places
            themselves.
        out: float32 [≥ stop − start, D], or None, which it must not be for a matrix of bfloat16.
        inverse: float32 [K, 1]; written at [start, stop); 0 for a row shorter than 10⁻¹⁰.
    """
    function, dim = _functions().pfc_measure_rows, matrix.shape[1]
    index = None if index is None else index.contiguous()
    narrow = matrix.dtype == torch.bfloat16

    def walk(first: int, last: int) -> None:
        begin, places = _begin(index, first)
        target = None if out is None else _row(out, first - start)
        function(_matrix(matrix, begin), places, last - first, dim, target, _row(inverse, first), narrow)

    _each_thread(start, stop, walk)


def copy_rows(to: Tensor, to_index: Tensor | None, source: Tensor, source_index: Tensor | None) -> None:
    """to[to_index[i]] = source[source_index[i]] for rows of one dtype and device; without an index i itself.

    Args:
        to: [N, ...]; the numbers of a row stand together, rows may stand apart. So for ``source`` [M, ...].
        to_index: int64 [n], each once; None for the first rows.
        source_index: int64 [n]; None for the first rows. One of both is given.
    """
    count = len(source_index if to_index is None else to_index)  # type: ignore[arg-type]
    if to.device.type != "cpu" or passes() is None:
        rows = source[:count] if source_index is None else source.index_select(0, source_index)
        to[slice(count) if to_index is None else to_index] = rows
        return
    function, bytes_of_row = _functions().pfc_copy_rows, to[:1].numel() * to.element_size()

    def walk(first: int, last: int) -> None:
        (begin_to, places_to), (begin, places) = _begin(to_index, first), _begin(source_index, first)
        function(_matrix(to, begin_to), places_to, _matrix(source, begin), places, last - first, bytes_of_row)

    _each_thread(0, count, walk)


def will_need(matrix: Tensor, index: Tensor) -> None:
    """Asks the system to read rows of a matrix [N, ...] that is mapped from a file, without waiting for them."""
    if passes() is not None and len(index):
        bytes_of_row = matrix[:1].numel() * matrix.element_size()
        _functions().pfc_will_need(_matrix(matrix, 0), index.data_ptr(), len(index), bytes_of_row)


def exponentials(
    products: Tensor, inverse: Tensor, scale: float, hard: tuple[Tensor, Sequence[float]] | None, total: Tensor
) -> None:
    """p = exp(scale·z) with z = products·inverse, 0 where the product is −∞, summed over the rows.

    Args:
        products: [n, B] float32, contiguous; p·inverse when it returns.
        inverse: [n, 1].
        hard: thresholds, float32 [B], and the numbers a, b, c, d and shift of hard negatives (``kernels/hard.py``): p
            is exp(scale·g(z) − shift), and p·g′(z)·inverse is left; None for none.
        total: float64 [B], to which Σ p is added.
    """
    function, batch = _functions().pfc_exponentials, products.shape[1]
    sums: dict[int, Tensor] = {}
    threshold, numbers = (None, _Hard()) if hard is None else (hard[0], _Hard(*hard[1]))

    def walk(first: int, last: int) -> None:
        partial, mine = torch.empty(batch), torch.zeros(batch, dtype=torch.float64)
        addresses = partial.data_ptr(), mine.data_ptr()
        where = None if threshold is None else threshold.data_ptr()
        function(_row(products, first), _row(inverse, first), last - first, batch, scale, where, numbers, *addresses)
        sums[first] = mine

    _each_thread(0, len(products), walk)
    for first in sorted(sums):  # not in the order in which the threads ended: the same run, bit for bit
        total += sums[first]


class CompiledStep(RowStep):
    """The rows [start, stop) of a step, stepped by a compiled pass.

    Args:
        index: places of all the step's rows in the matrices, int64 [K]; None for all rows.
        gradient: [stop − start, D] float32, changed.
        inverse: inverse norms [K, 1], where the gradient is that by ŵ over ‖w‖ and the projection is still to be made;
            None where it is that by the rows.
        factor: multiplies the gradient.
        rounding: of matrices in bfloat16; None where there are none.
    """

    def __init__(
        self,
        index: Tensor | None,
        start: int,
        stop: int,
        gradient: Tensor,
        inverse: Tensor | None,
        factor: float,
        rounding: Rounding | None = None,
    ) -> None:
        self.index = None if index is None else index.contiguous()
        self.start, self.stop = start, stop
        self.gradient, self.inverse, self.factor = gradient, inverse, factor
        self.rounding = rounding
        self.ids = None if rounding is None or rounding.ids is None else rounding.ids.contiguous()

    def _run(self, rule: str, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        function, dim = getattr(_functions(), f"pfc_{rule}"), self.gradient.shape[1]
        narrow = tensors[0] is not None and tensors[0].dtype == torch.bfloat16

        def walk(first: int, last: int) -> None:
            begin, places = _begin(self.index, first)
            rows = (_Matrix * len(tensors))(*(_matrix(tensor, begin) for tensor in tensors))
            gradient = _row(self.gradient, first - self.start)
            inverse = None if self.inverse is None else _row(self.inverse, first)
            how = self._rounding(first)
            function(rows, places, last - first, dim, gradient, inverse, self.factor, how, narrow, *numbers)

        _each_thread(self.start, self.stop, walk)

    def _rounding(self, first: int) -> _Rounding:
        how = self.rounding
        if how is None:
            return _Rounding(None, 0, 0)
        begin, ids = _begin(self.ids, first)
        return _Rounding(ids, how.first + begin, how.key)


def _begin(index: Tensor | None, first: int) -> tuple[int, int | None]:
    """Where a walk begins: the row that places count from, and the address of its first place in the index.

    Without an index the places are those of the rows from ``first`` on.
    """
    return (first, None) if index is None else (0, index.data_ptr() + index.element_size() * first)


def _matrix(tensor: Tensor | None, row: int) -> _Matrix:
    """Of the rows from ``row`` on."""
    return _Matrix(None, 0) if tensor is None else _Matrix(_row(tensor, row), tensor.stride(0) * tensor.element_size())


def _row(tensor: Tensor, row: int) -> int:
    """The address of a row."""
    return tensor.data_ptr() + tensor.element_size() * tensor.stride(0) * row


def _functions() -> ctypes.CDLL:
    loaded = passes()
    assert loaded is not None
    return loaded


def _each_thread(start: int, stop: int, walk: Callable[[int, int], None]) -> None:
    """Cuts [start, stop) into as many parts as torch has threads. The walks let go of the interpreter's lock."""
    threads = min(torch.get_num_threads(), (stop - start) // _FEWEST_ROWS)
    if threads <= 1:
        walk(start, stop)
        return
    cuts = [start + (stop - start) * part // threads for part in range(threads + 1)]
    waiting = [_pool().submit(walk, *cut) for cut in pairwise(cuts[1:])]
    walk(cuts[0], cuts[1])
    for one in waiting:
        one.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pfc-rows")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
