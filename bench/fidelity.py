"""Print how much of SAM's perturbation weights of 16 bits take: norm over rho, and cosine to the intended direction.

python -m bench.fidelity [--rho 0.05]

The last column projects the realised perturbation on the intended direction: 1 means that the model moves as far along
it as it should, whatever noise comes on top.
"""

from __future__ import annotations

import argparse

import torch

from fsam_triton import FSAM

from .workloads import bert_base_shapes, make_parameters


def realised(dtype: torch.dtype, rho: float, **arguments: bool) -> tuple[float, float, float]:
    """Norm over rho, cosine, and projection over rho of the realised perturbation of a quarter of BERT-base."""
    params = make_parameters(bert_base_shapes()[5:53], dtype)
    before = [p.detach().double() for p in params]
    grads = [p.grad.double() for p in params]
    FSAM(params, rho=rho, **arguments).perturb()
    eps = torch.cat([(p.detach().double() - w).flatten() for p, w in zip(params, before, strict=True)])
    direction = torch.cat([g.flatten() for g in grads])
    norm, along = eps.norm().item(), (eps @ direction / direction.norm()).item()
    return norm / rho, along / norm if norm else 0.0, along / rho


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rho", type=float, default=0.05)
    rho = parser.parse_args().rho
    print(f"rho {rho}, weights of standard deviation 0.02\n{'':36}{'norm/rho':>10}{'cosine':>9}{'projection/rho':>16}")
    for name, dtype, stochastic in (
        ("fp32", torch.float32, False),
        ("bf16, rounded to nearest", torch.bfloat16, False),
        ("bf16, stochastically rounded", torch.bfloat16, True),
        ("fp16, rounded to nearest", torch.float16, False),
        ("fp16, stochastically rounded", torch.float16, True),
    ):
        norm, cosine, along = realised(dtype, rho, stochastic_rounding=stochastic)
        print(f"{name:36}{norm:10.3f}{cosine:9.3f}{along:16.3f}")


if __name__ == "__main__":
    main()
