"""What reward a model begins with, environment by environment: policy gradients need one between 0 and 1.

    python -m benchmarks.rl_beginnings                                          # all tasks of reasoning-gym, plain
    python -m benchmarks.rl_beginnings --env sums --env gym:chain_sum:max_terms=2 --parent runs/sft

Each environment is asked `--tasks` tasks, once each at temperature 1, without and with thinking; printed is the mean
reward. Many verifiers of reasoning-gym give a little for any number, so a mean of 0.02 may be no answer that is right.
Left out of the list of all are the tasks that take long to make (docs/environments.md) and prompts too long for
`nano`, which then read as unscored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from glm5.bundled import bundled_model
from glm5.checkpoint import load_model
from glm5.cli.rl_environments import named_environment
from glm5.envs import ReasoningGym
from glm5.rl.held_out import HeldOut, held_out_rewards
from glm5.rl.rollout_config import RolloutConfig
from glm5.text import Tokenizer
from glm5.train.run_directory import model_of

SLOW = frozenset(
    {"arc_agi", "codeio", "figlet_font", "group_anagrams", "knight_swap", "sudoku", "word_ladder", "zebra_puzzles"}
)


@dataclass
class Options:
    """Options of the script."""

    env: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """As for `glm5 rl`; none: all tasks of reasoning-gym."""
    parent: Path | None = None
    """A run or a model directory; None: the bundled `nano`."""
    world: Path | None = None
    """That facts and lookup ask about."""
    tasks: int = 64
    """Of each environment."""
    max_tokens: int = 64
    """Of an answer."""
    max_prompt: int = 512
    """Tokens of the longest prompt."""


def main(options: Options) -> None:
    """Measures and prints, line by line."""
    torch.set_num_threads(1)
    directory = model_of(options.parent or bundled_model())
    model, tokenizer = load_model(directory, dtype=torch.float32), Tokenizer.from_pretrained(directory)
    names = options.env or tuple(f"gym:{name}" for name in ReasoningGym.names() if name not in SLOW)
    print("| environment | without thinking | with |\n|---|---|---|")
    for name in names:
        environment = named_environment(name, options.world).environment
        cells = []
        for thinking in (False, True):
            rollout = RolloutConfig(
                max_tokens=options.max_tokens, thinking=thinking,
                max_episode_tokens=options.max_prompt + options.max_tokens,
            )  # fmt: skip
            asked = held_out_rewards([environment], tokenizer, HeldOut(tasks=options.tasks), rollout, "sparse")
            assert asked is not None
            found = {key.rpartition("/")[2]: value for key, value in asked.measure(model).items()}
            unscored = f" ({found['unscored']:.0%} unscored)" if "unscored" in found else ""
            cells.append((f"{found['reward']:.3f}" if "reward" in found else "none") + unscored)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
