"""The largest eigenvalues of the Hessian of the mean loss."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import check
from .mean_loss import Loss, MeanLoss, measuring


def hessian_eigenvalues(
    model: nn.Module, loss: Loss, batches: Iterable[Any], k: int = 1, tolerance: float = 1e-3
) -> list[float]:
    """The k largest eigenvalues of the Hessian of the mean loss over all batches; needs SciPy.

    They are computed by the Lanczos method on Hessian-vector products (ARPACK, `scipy.sparse.linalg.eigsh`). A product
    is exact: the gradient is differentiated, which takes about two forward and backward passes over all batches.
    Attention is computed without fused kernels, which cannot be differentiated twice; a model that uses kernels of its
    own (flash-attn) cannot be measured. ARPACK takes about 2 k + 16 numbers of 8 bytes for each weight on the host:
    freeze the parameters that do not interest you. The model and random states are left alone, as by `m_sharpness`.

    Args:
        model, loss, batches: as for `m_sharpness`.
        k: number of eigenvalues, from 1 to one less than the number of weights (default: 1).
        tolerance: relative error of the eigenvalues, in (0, 1) (default: 1e-3). Products are in the weights' type: with
            fp32, less than 1e-6 cannot be reached.

    Returns:
        The algebraically largest eigenvalues, the largest first.

    Raises:
        ValueError, FloatingPointError: as for `m_sharpness`.
        ImportError: SciPy is not installed.
        RuntimeError: Lanczos did not converge, or a part of the model cannot be differentiated twice.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> loss = lambda model, x: 0.5 * model(x).square().sum()
        >>> [round(value, 4) for value in hessian_eigenvalues(model, loss, [torch.tensor([[3.0, 0.0], [0.0, 2.0]])])]
        [9.0]
    """
    check(0 < tolerance < 1, "tolerance", tolerance, "must be in (0, 1)")
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise ImportError("hessian_eigenvalues needs SciPy: pip install 'fsam-triton[analysis]'") from error
    with measuring(model, loss, batches) as mean, sdpa_kernel(SDPBackend.MATH):
        n = sum(w.numel() for w in mean.weights)
        check(isinstance(k, int) and 1 <= k < n, "k", k, f"must be an int from 1 to {n - 1}: the model has {n} weights")
        product = functools.partial(_hessian_product, mean)
        # In the range of the Hessian: ARPACK fails on one of zeros.
        start = product(numpy.random.default_rng(0).standard_normal(n))
        if not start.any():
            return [0.0] * k

        class Hessian(LinearOperator):
            def _matvec(self, x: numpy.ndarray) -> numpy.ndarray:
                return product(x)

        # Fewer vectors than by default, which keeps 20: they are most of the memory. SciPy declares no types, only the
        # default tolerance, which is 0.
        options = {"which": "LA", "v0": start, "ncv": min(n, 2 * k + 8), "tol": tolerance}
        values = eigsh(Hessian(numpy.float64, (n, n)), k, return_eigenvectors=False, **options)
    return sorted(map(float, values), reverse=True)


def _hessian_product(mean: MeanLoss, x: numpy.ndarray) -> numpy.ndarray:
    """The product for all weights in one fp64 vector on the host."""
    pieces = torch.from_numpy(x.ravel()).split([w.numel() for w in mean.weights])
    parts = mean.hessian_product([piece.view(w.shape).to(w) for piece, w in zip(pieces, mean.weights, strict=True)])
    product = torch.cat([part.flatten().to("cpu", torch.float64) for part in parts])
    if not product.isfinite().all():
        raise FloatingPointError("a product with the Hessian is not finite: the loss has no second derivative here")
    return product.numpy()
