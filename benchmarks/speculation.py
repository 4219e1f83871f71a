"""What speculation yields: accept length and speed per number of drafts, and how much each rule would accept.

    python -m benchmarks.speculation MODEL_DIRECTORY [--chat] [--tokens 100] [--rounds 3]

Prompts are the beginnings of a few sentences (with `--chat` questions in the chat format); the engine continues them
alone (batch 1), with and without drafts in turn within each round, so that a busy machine slows both. Time is
processor time of this process. The rules are compared without sampling, from the two distributions at each position
of text that the model wrote: the greatest probability (draft the likeliest token), the overlap of the cumulative
distributions (ours: the same random number for both), and the overlap of the distributions (Leviathan et al. 2023).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from glm5 import GLM5, Tokenizer, load_model
from glm5.engine import Engine, SamplingParams
from glm5.engine.pace import Pace
from glm5.engine.sampler import filtered_weights

PROMPTS = ("The capital of", "In the year", "She said that the", "Once upon a time")
QUESTIONS = ("What is 12 + 30?", "Say hello.", "What is the capital of Skaibestan?", "Count from 3 to 9.")
TEMPERATURES = (0.0, 0.7, 1.0)
DRAFTS = (1, 2, 3, 4)


class Always(Pace):
    """Drafts whether or not it pays."""

    def wanted(self, sequences: int) -> bool:
        return True


def run(engine: Engine, prompts: list[list[int]], temperature: float, tokens: int) -> tuple[float, int, list[int]]:
    """Processor seconds, steps and token ids of the prompts one after another."""
    steps, started, ids = engine.stats().steps, time.process_time(), list[int]()
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed, ignore_eos=True)
        ids += engine.generate([prompt], params)[0].token_ids
    return time.process_time() - started, engine.stats().steps - steps, ids


def speeds(model: GLM5, prompts: list[list[int]], tokens: int, rounds: int) -> None:
    """Prints tokens per step and the time relative to no drafts."""
    engines: dict[int | str, Engine] = {
        k: Engine(model, num_speculative_tokens=k, enable_prefix_caching=False) for k in (0, *DRAFTS)
    }
    engines["1, where it pays"] = Engine(model, num_speculative_tokens=1, enable_prefix_caching=False)
    for k in DRAFTS:
        engines[k]._core.speculator.pace = Always()  # type: ignore[union-attr]
    print("| temperature | drafts | tokens per step | accepted | speed against none (min-max of rounds) |")
    print("|---|---|---|---|---|")
    for temperature in TEMPERATURES:
        ratios: dict[int | str, list[float]] = {}
        for _ in range(rounds):
            seconds = {k: run(engine, prompts, temperature, tokens) for k, engine in engines.items()}
            base = seconds[0]
            for drafts, (spent, _, _) in seconds.items():
                ratios.setdefault(drafts, []).append(base[0] / spent)
        for drafts, found in ratios.items():
            _, steps, ids = seconds[drafts]
            stats = engines[drafts].stats()
            accepted = f"{stats.accepted_tokens / stats.drafted_tokens:.0%}" if stats.drafted_tokens else ""
            same = "" if ids == base[2] else " (other tokens)"
            spread = f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"
            print(f"| {temperature} | {drafts} | {len(ids) / steps:.2f}{same} | {accepted} | {spread} |")


@torch.inference_mode()
def rules(model: GLM5, prompts: list[list[int]], tokens: int) -> None:
    """Prints how often the first draft would be accepted by each rule."""
    print("\n| temperature | likeliest token | same random number (ours) | classical rule |\n|---|---|---|---|")
    engine = Engine(model)
    for temperature in TEMPERATURES[1:]:
        params = SamplingParams(temperature=temperature)
        found = []
        for prompt in prompts:
            ids = run(engine, [prompt], temperature, tokens)[2]
            output = model(torch.tensor([[*prompt, *ids]]), collect={"mtp"})
            for i in range(len(prompt), len(prompt) + len(ids) - 2):
                p_V, q_V = (
                    weights / weights.sum()
                    for weights in (
                        filtered_weights(output.logits[0, i + 1], params),
                        filtered_weights(output.mtp_logits[0][0, i], params),
                    )
                )
                p_ends, q_ends = p_V.cumsum(), q_V.cumsum()
                shared = np.minimum(p_ends, q_ends) - np.maximum(p_ends - p_V, q_ends - q_V)
                found.append((p_V[q_V.argmax()], shared.clip(0).sum(), np.minimum(p_V, q_V).sum()))
        print(f"| {temperature} | " + " | ".join(f"{share:.1%}" for share in np.mean(found, axis=0)) + " |")


def main() -> None:
    """Measures the model of a directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model).eval(), Tokenizer.from_pretrained(options.model)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    if options.chat:
        prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in QUESTIONS]
    rules(model, prompts, options.tokens)
    speeds(model, prompts, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
