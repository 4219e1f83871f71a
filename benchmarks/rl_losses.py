"""The losses on stale samples, where the truth is known: a table instead of a model, thousands of steps in a minute.

    python -m benchmarks.rl_losses [--steps 60] [--seeds 5] [--rates 0.1 0.3] [--lags 0 4 8] [--only DDIS]
                                   [--reset]

The policy is a table of logits for each question and each of 6 positions over 32 tokens; an answer is right when at
least half of its tokens are (the right ones are fixed by the seed), so the reward is 0 or 1 and rare at first. Each
step samples 8 questions x 8 answers from the table of `lag` steps ago, takes group advantages with their standard
deviation, weighs every answer the same, and moves the table by Adam (0.9, 0.98) with the gradient clipped to a norm
of 1. Printed is the exact chance of a right answer at the end, over all questions, mean and spread over seeds, and the
share of tokens that were masked or are out of a bound, on its harmless side too. `--reset`: Adam forgets its moments
after every step.

This is a model of staleness alone: trainer and sampler compute the same, and nothing generalises. It is why DDIS
has the default bounds that it has; whole runs on real tasks are in `benchmarks.rl_staleness`.
"""

from __future__ import annotations

import argparse
import statistics
from collections import deque

import torch
from torch import Tensor

from glm5.rl.advantages import group_advantages
from glm5.rl.loss import PolicyLoss, PolicyTokens
from glm5.rl.losses import CISPO, DDIS, DPPO, GSPO, OPSM, PPO, TIS, DecoupledPPO, IcePop, Reinforce

QUESTIONS, POSITIONS, TOKENS, GROUPS, GROUP_SIZE, NEEDED = 16, 6, 32, 8, 8, 3
LOSSES: dict[str, PolicyLoss] = {
    "DDIS .5 1": DDIS(),
    "DDIS .2 .28": DDIS(epsilon_low=0.2, epsilon_high=0.28),
    "DDIS .8 4": DDIS(epsilon_low=0.8, epsilon_high=4.0),
    "PPO against the sampler": PPO(against="sampler"),
    "PPO against the trainer": PPO(),
    "decoupled PPO": DecoupledPPO(),
    "IcePop": IcePop(),
    "TIS": TIS(),
    "CISPO": CISPO(),
    "GSPO": GSPO(),
    "DPPO": DPPO(),
    "IPO": DPPO(symmetric=True),
    "OPSM": OPSM(),
    "REINFORCE": Reinforce(),
}


def chance(table_QPV: Tensor, right_QP: Tensor) -> float:
    """Of a right answer, exactly: the distribution of the number of right tokens, position by position."""
    hit_QP = table_QPV.softmax(-1).gather(-1, right_QP[..., None])[..., 0]
    count_QK = torch.zeros(QUESTIONS, POSITIONS + 1)
    count_QK[:, 0] = 1
    for p_Q in hit_QP.unbind(1):
        moved_QK = torch.cat((torch.zeros(QUESTIONS, 1), count_QK[:, :-1]), 1)
        count_QK = count_QK * (1 - p_Q[:, None]) + moved_QK * p_Q[:, None]
    return count_QK[:, NEEDED:].sum(1).mean().item()


def tokens_of(table_QPV: Tensor, old_QPV: Tensor, right_QP: Tensor, lag: int, generator: torch.Generator) -> (
    tuple[PolicyTokens | None, float]
):  # fmt: skip
    """One batch sampled from `old_QPV`, judged by `table_QPV`; None when no group has both rewards."""
    asked_G = torch.randint(QUESTIONS, (GROUPS,), generator=generator)
    asked_R = asked_G.repeat_interleave(GROUP_SIZE)
    sampler_RPV = old_QPV.log_softmax(-1)[asked_R]
    said_RP = torch.multinomial(sampler_RPV.exp().flatten(0, 1), 1, generator=generator).view(-1, POSITIONS)
    rewards_R = ((said_RP == right_QP[asked_R]).sum(1) >= NEEDED).float()
    kept, advantages = list[int](), list[float]()
    for group, rewards in enumerate(rewards_R.view(GROUPS, GROUP_SIZE).tolist()):
        found = group_advantages(rewards)
        if found is not None:
            kept += range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
            advantages += found
    if not kept:
        return None, 0.0
    rows = torch.tensor(kept)
    trainer_RPV = table_QPV.log_softmax(-1)[asked_R[rows]]
    logprobs_N = trainer_RPV.gather(-1, said_RP[rows][..., None]).flatten()
    count = len(logprobs_N)
    return PolicyTokens(
        logprobs_N=logprobs_N,
        old_logprobs_N=logprobs_N.detach(),
        sampled_logprobs_N=sampler_RPV[rows].gather(-1, said_RP[rows][..., None]).flatten(),
        advantages_N=torch.tensor(advantages).repeat_interleave(POSITIONS),
        weights_N=torch.full((count,), 1 / count),
        sequences_N=torch.arange(len(kept)).repeat_interleave(POSITIONS),
        ages_N=torch.full((count,), lag),
    ), rewards_R.mean().item()


def learn(loss: PolicyLoss, *, lag: int, rate: float, steps: int, seed: int, reset: bool) -> tuple[float, float]:
    """The chance of a right answer at the end, and the mean share of tokens that were masked, clipped or capped."""
    generator = torch.Generator().manual_seed(seed)
    right_QP = torch.randint(TOKENS, (QUESTIONS, POSITIONS), generator=generator)
    table_QPV = torch.zeros(QUESTIONS, POSITIONS, TOKENS)
    table_QPV.scatter_(-1, right_QP[..., None], 1.5)  # it has some idea, or nothing would ever be right
    table_QPV.requires_grad_()
    optimizer = torch.optim.Adam([table_QPV], lr=rate, betas=(0.9, 0.98))
    versions = deque([table_QPV.detach().clone()], maxlen=lag + 1)
    held: list[float] = []
    for _ in range(steps):
        tokens, _ = tokens_of(table_QPV, versions[0], right_QP, len(versions) - 1, generator)
        if tokens is not None:
            result = loss(tokens)
            result.total.backward()
            torch.nn.utils.clip_grad_norm_([table_QPV], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            held.append(sum(v.item() for k, v in result.diagnostics.items() if k in ("masked", "clipped", "capped")))
            if reset:
                optimizer.state.clear()
        versions.append(table_QPV.detach().clone())
    return chance(table_QPV.detach(), right_QP), statistics.fmean(held) if held else 0.0


def main() -> None:
    """Prints one table for each learning rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--only", default="", help="losses whose name begins so")
    parser.add_argument("--reset", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for rate in args.rates:
        print(f"\nrate {rate}, {args.steps} steps, {args.seeds} seeds{', moments reset' if args.reset else ''}")
        print("| loss | " + " | ".join(f"lag {lag}: right (min-max), held" for lag in args.lags) + " |")
        print("|---|" + "---|" * len(args.lags))
        for name, loss in LOSSES.items():
            if not name.startswith(args.only):
                continue
            cells = []
            for lag in args.lags:
                ends, held = zip(*(
                    learn(loss, lag=lag, rate=rate, steps=args.steps, seed=seed, reset=args.reset)
                    for seed in range(args.seeds)
                ), strict=True)  # fmt: skip
                spread = f"{min(ends):.2f}-{max(ends):.2f}"
                cells.append(f"{statistics.fmean(ends):.2f} ({spread}), {statistics.fmean(held):.0%}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
