"""Which experts a model chooses by itself, to compare with what an engine reports of them."""

import numpy as np
import torch


@torch.no_grad()
def plain(model, token_ids):
    """Experts [T, L, K] of every token but the last, in one pass without a cache; each token's in ascending order."""
    records = model(torch.tensor([token_ids[:-1]]), collect={"router"}).router
    return torch.stack([record.experts_BTK[0] for record in records], dim=1).sort(-1).values.numpy()


def ordered(experts):
    """Those of an `ExpertChoices`, each token's in ascending order."""
    return np.sort(experts.array, axis=-1)
