"""TRL's GRPOTrainer on our model and our tasks: the other side of `benchmarks/rl_async.py`.

It trains the same directory (which `transformers` reads as `glm_moe_dsa`), on the same questions in the same order,
with the same group size, learning rate, clip bounds and loss, full fine-tuning in fp32, temperature 1, one thread. It
runs in a process of its own, so that processor time is its own. Needs `trl` (pip install 'glm5[peers]').
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    """What to train."""

    model: str
    task: str
    """A name of `benchmarks.rl_tasks.TASKS`."""
    steps: int
    prompts: int
    group_size: int
    max_tokens: int
    rate: float
    seed: int
    threads: int = 1


@dataclass(frozen=True)
class PeerResult:
    """What came of it; seconds are those of `train()` alone, loading not counted."""

    rewards: list[float]
    wall_seconds: float
    cpu_seconds: float


def run_peer(run: PeerRun) -> PeerResult:
    """Trains in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.rl_peer", json.dumps(asdict(run))],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"TRL ended with {done.returncode}: {done.stderr[-2000:]}")
    return PeerResult(**json.loads(done.stdout.strip().splitlines()[-1]))


def train(run: PeerRun) -> PeerResult:
    """In this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.rl_tasks import TASKS, environment
    from glm5.text import Tokenizer, parse_assistant

    torch.set_num_threads(run.threads)
    own = Tokenizer.from_pretrained(run.model)
    env = environment(TASKS[run.task])
    tasks = [env.task(run.seed, index) for index in range(run.steps * run.prompts)]
    prompts = [own.apply_chat_template(t.messages, enable_thinking=False, tokenize=False) for t in tasks]
    by_number = dict(enumerate(tasks))
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    model.generation_config.eos_token_id = sorted(own.eos_ids)

    def reward(completions: list[str], number: list[int], **_: object) -> list[float]:
        return [
            env.score(by_number[n], parse_assistant(text, thinking=False)).value
            for n, text in zip(number, completions, strict=True)
        ]

    with tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=directory, use_cpu=True, bf16=False, max_steps=run.steps, seed=run.seed,
                per_device_train_batch_size=run.prompts * run.group_size, num_generations=run.group_size,
                max_completion_length=run.max_tokens, temperature=1.0, shuffle_dataset=False,
                learning_rate=run.rate, lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.98,
                max_grad_norm=1.0, beta=0.0, epsilon=0.2, epsilon_high=0.28, loss_type="grpo", scale_rewards="group",
                report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": p, "number": n} for n, p in enumerate(prompts)]),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_file=str(Path(run.model) / "tokenizer.json"), eos_token="<|user|>",
                pad_token="<|endoftext|>",
            ),
        )  # fmt: skip
        wall, cpu = time.perf_counter(), _processor()
        trainer.train()
        wall, cpu = time.perf_counter() - wall, _processor() - cpu
    history = trainer.state.log_history
    return PeerResult([line["reward"] for line in history if "reward" in line], wall, cpu)


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(asdict(train(PeerRun(**json.loads(sys.argv[1]))))))
