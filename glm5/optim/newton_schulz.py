"""Orthogonalisation of a matrix by a quintic Newton-Schulz iteration, over any number of matrices at once.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; five steps, as in the GLM-5 report
(appendix A). The coefficients are theirs: they give up exact convergence (singular values end between about 0.7 and
1.2) for speed. Left out: the Gram-space and Polar-Express variants.
"""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7


def orthogonalise(matrices: torch.Tensor, *, steps: int = STEPS) -> torch.Tensor:
    """The nearest matrices with (about) equal singular values, in `working_dtype`: for G = U S V^T, about U V^T.

    `matrices` is [count, rows, columns]; every matrix is treated by itself.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(working_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # iterate on the smaller Gram matrix
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)  # the polynomial needs singular values of at most 1
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, in which the method was published and which is enough: the result is a direction that a rate scales.

    float32 on a processor without bfloat16 instructions: emulated products are slower than float32 ones by far.
    """
    slow = device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return torch.float32 if slow else torch.bfloat16
