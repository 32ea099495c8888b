"""`estimate_fisher`: the diagonal Fisher information of a model's parameters from per-sample gradients."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check
from ..evaluation import evaluating, trainable_parameters
from ..kernels.reference import compute_dtype
from .hooked import HookedPasses
from .objective import Batch, Objective
from .slow import SlowPasses

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


def estimate_fisher(
    model: nn.Module,
    dataloader: Iterable[Any],
    num_samples: int,
    kind: str = "label",
    statistic: str = "square",
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information matrix (FISH masks, arXiv 2111.09839, eq. 2 to 6).

    With g(x, y) the gradient of one sample's loss, -log p(y | x) by default, and N samples:

        kind="label":   F = 1/N sum_i g(x_i, y_i)^2                      (eq. 6, the empirical Fisher information)
        kind="expect":  F = 1/N sum_i sum_y p(y | x_i) g(x_i, y)^2       (eq. 4, classes weighted as the model does)

    The squares are those of single samples' gradients, not of a batch's. They take one forward pass and one backward
    pass per batch (with "expect", one backward pass per class) if a parameter is only used by functions that are known
    here: those of Linear, Embedding, Conv2d, LayerNorm, RMSNorm, GroupNorm, BatchNorm and transformers' Conv1D, and
    sums and products with a parameter. Any other parameter takes a slower way with the same result.

    During the estimate the model is in eval mode, so that there is no dropout and samples do not see each other; its
    modes are restored afterwards. `p.grad`, `requires_grad` and hooks stay as they are. Under `torch.autocast`, or with
    16-bit weights, products of 16-bit numbers are summed in fp32; fp16 gradients can underflow, as there is no loss
    scaling.

    Two kinds of biases are not worth training, whatever their scores. Freeze them, and they are not estimated:

    - A bias in front of BatchNorm has information in eval mode, where the running mean is a constant. In training mode
      the batch's mean removes the bias again: its gradient consists of rounding errors, which Adam turns into steps.
    - A bias in front of InstanceNorm, or of the keys of attention, has no influence at all. Its score consists of
      rounding errors: in fp32 at most 1e-14 of the largest score. That is more than the exact zeros of unused
      embeddings, and less than the scores of any share of weights that is worth training. It is not set to zero,
      because a gradient does not tell how large the terms were that cancelled in it.

    Args:
        model: takes the batches and returns logits, or an object with the attribute `logits`.
        dataloader: yields dicts with the key "labels" (passed as `model(**batch)`) or pairs (inputs, labels) (passed as
            `model(inputs)`); the first dimension of tensors counts samples. Tensors are moved to the model's device.
        num_samples: number of samples to use; the last batch is cut. If there are fewer, all are used, with a warning.
        kind: "label" for the given labels, "expect" for an expectation over the model's own classes (needs no labels).
        statistic: "square", or "abs" for the mean of |g| instead of g^2.
        loss_fn: for kind="label": `loss_fn(logits, labels)` returns one loss per sample. Default: cross entropy of
            logits [batch, classes]; for causal language models use `causal_lm_loss`. 16-bit logits are converted to
            fp32 first.
        progress: whether to show a progress bar, if tqdm is installed.

    Returns:
        By name, the estimate for each parameter that requires a gradient (tied ones under their first name), in the
        parameter's shape, fp32 (fp64 for fp64 parameters).

    Raises:
        ValueError: an argument or a batch is not as described.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.weight.data.zero_(), model.bias.data.zero_()
        >>> batches = [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1]))]
        >>> estimate_fisher(model, batches, num_samples=2, progress=False)["weight"]
        tensor([[1.2500, 2.5000],
                [1.2500, 2.5000]])
    """
    integer = isinstance(num_samples, int) and not isinstance(num_samples, bool)
    check(integer and num_samples > 0, "num_samples", num_samples, "a positive integer is expected")
    check(kind in ("label", "expect"), "kind", kind, "'label' or 'expect' is expected")
    check(statistic in ("square", "abs"), "statistic", statistic, "'square' or 'abs' is expected")
    check(loss_fn is None or callable(loss_fn), "loss_fn", loss_fn, "a function of logits and labels is expected")
    check(loss_fn is None or kind == "label", "loss_fn", loss_fn, "kind='expect' takes the model's own probabilities")
    params = trainable_parameters(model)
    objective = Objective(kind, statistic == "abs", loss_fn)
    fisher = {name: torch.zeros(p.shape, dtype=compute_dtype(p.dtype), device=p.device) for name, p in params.items()}
    device = next(iter(params.values())).device
    hooked, slow = HookedPasses(params, fisher, objective), SlowPasses(model, params, fisher, objective)
    done = 0
    with evaluating(model), torch.enable_grad(), _progress_bar(num_samples, progress) as advance:
        for raw in dataloader:
            batch = Batch.of(raw, device, labelled=kind == "label")[: num_samples - done]
            if batch.size == 0:
                continue
            hooked.add(model, batch)
            slow.add([name for name, p in params.items() if id(p) in hooked.slow], batch)
            done += batch.size
            advance(batch.size)
            if done == num_samples:
                break
    check(done > 0, "dataloader", dataloader, "it gives no samples")
    if done < num_samples:
        warnings.warn(f"estimate_fisher: {done} samples instead of {num_samples}: the loader ended", stacklevel=2)
    return {name: total.div_(done) for name, total in fisher.items()}


@contextlib.contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int], Any]]:
    if not show or tqdm is None:
        yield lambda samples: None
        return
    with tqdm(total=total, desc="Fisher information", unit="sample") as bar:
        yield bar.update
