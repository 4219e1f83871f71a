"""A rank of tensor parallelism none of whose experts was chosen: it gives zeros and gradients, and nobody waits."""

import pytest
import torch

from glm5.ops.experts import Experts
from glm5.parallel import tensor
from glm5.parallel.tensor import CutExperts


@pytest.mark.parametrize("grad", [False, True])
def test_no_token_for_this_rank(monkeypatch, grad):
    monkeypatch.setattr(tensor, "copy_to", lambda x, group: x)
    monkeypatch.setattr(tensor, "sum_over", lambda x, group: x)
    monkeypatch.setattr(tensor, "local", lambda weight: weight)
    experts = Experts(2, 8, 4, dtype=torch.float32, device=None)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    experts.__class__ = CutExperts
    experts.group, experts.first = None, 4  # experts 4 and 5 are here
    x_ND = torch.randn(3, 8, requires_grad=grad)
    chosen_NK, weights_NK = torch.tensor([[0, 1], [2, 3], [1, 6]]), torch.rand(3, 2)
    with torch.set_grad_enabled(grad):
        y_ND = experts(x_ND, chosen_NK, weights_NK)
    assert torch.equal(y_ND, torch.zeros(3, 8))
    if grad:
        y_ND.square().sum().backward()
        assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in experts.parameters())
