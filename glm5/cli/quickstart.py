"""`glm5 quickstart`: real public text to a model that answers, every stage in its thinnest real form.

    corpus -> tokenizer -> pretrain -> dsa (the indexer) -> sft -> evaluation -> rl -> evaluation -> report

Each stage is a directory under `--out`; a stage that is whole is not done again. Ctrl-C saves, `--resume` goes on from
the exact step. Nothing is downloaded: the text comes with the installed packages.
"""

from __future__ import annotations

import dataclasses
import json as json_text
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from glm5.checkpoint import load_model
from glm5.cli.quickstart_page import write_page
from glm5.config import ModelConfig
from glm5.data import Corpus, build_corpus, chat_documents, open_corpus, open_dataset, tokenize_corpus, write_dataset
from glm5.data.arithmetic import problems
from glm5.engine import Engine
from glm5.envs import Arithmetic
from glm5.errors import RunError
from glm5.evals import EvalConfig, EvalResult, evaluate, write_evaluation
from glm5.files import write_json
from glm5.optim import OptimizerConfig
from glm5.rl import RLConfig, train_policy
from glm5.text import Tokenizer
from glm5.train import PretrainConfig, RunDirectory, SFTConfig, pretrain, sft
from glm5.train.dsa import DSAConfig, warm_up_indexer

StageConfig = TypeVar("StageConfig", PretrainConfig, DSAConfig, SFTConfig)

LARGEST, OPERATIONS = 20, "+-"
"""The arithmetic that SFT shows, RL practises and the evaluation asks about."""
SFT_STEPS = 130
"""Fewer than what would master the training problems: policy gradients need something left to improve."""
RL_STEPS = 120
RL_OPTIMIZER = OptimizerConfig(name="adamw", lr=5e-4, betas=(0.9, 0.98), weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """From text to a model that answers, in minutes on a laptop."""

    out: Path = Path("runs/quickstart")
    """Directory of the whole run."""
    preset: str = "nano"
    """The model's shape."""
    resume: bool = False
    """Go on where an interrupted quickstart stopped."""
    threads: int | None = None
    """Processor threads; all cores when left out."""
    pretrain_steps: int | None = None
    """Instead of the tuned number; fewer for a quick look."""
    dsa_steps: int | None = None
    """Steps of the indexer's warm-up."""
    sft_steps: int | None = None
    """Steps of supervised fine-tuning."""
    rl_steps: int | None = None
    """Steps of policy gradients."""
    eval_tasks: int = 200
    """Arithmetic questions of each evaluation."""
    json: bool = False
    """Print the result as one JSON object."""


def run(options: QuickstartOptions) -> int:
    """Runs the whole chain; prints where everything is and what to try next."""
    out = options.out
    if out.exists() and any(out.iterdir()) and not options.resume:
        raise RunError(f"{out} already holds a run; go on with --resume, or choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(stderr=options.json)
    started = time.perf_counter()
    chain = Chain(options, console)
    summary = chain.run()
    summary["seconds_of_this_session"] = round(time.perf_counter() - started, 1)
    write_json(out / "summary.json", {"kind": "quickstart", **summary})
    page = write_page(out, summary)
    if options.json:
        print(json_text.dumps(summary))
        return 0
    console.print(f"\nReport:       {page}", soft_wrap=True)
    console.print(f"Talk to it:   glm5 chat {out / 'rl'} --no-thinking", soft_wrap=True)
    console.print(f"Serve it:     glm5 serve {out / 'rl'}", soft_wrap=True)
    return 0


class Chain:
    """The stages in order. Each method gives what the summary says of its stage."""

    def __init__(self, options: QuickstartOptions, console: Console) -> None:
        self.options, self.console, self.out = options, console, options.out
        self.config = ModelConfig.from_preset(options.preset)

    def run(self) -> dict[str, Any]:
        """Runs or skips every stage; returns the summary."""
        summary = {"preset": self.options.preset, "parameters": self.config.num_parameters(mtp=True)}
        summary["corpus"] = self.prepare_text()
        summary["pretrain"] = self.pretrain()
        summary["transformers"] = self.compare_with_transformers()
        summary["dsa"] = self.warm_up_indexer()
        self.sft()
        summary["evaluation_after_sft"] = self.evaluate("sft")
        summary["rl"] = self.rl()
        summary["evaluation_after_rl"] = self.evaluate("rl")
        return summary

    def heading(self, text: str) -> None:
        self.console.rule(f"[bold]{text}", align="left")

    def run_directory(self, stage: str) -> dict[str, Any]:
        """What every stage's call takes: where, and whether to go on."""
        path = self.out / stage
        return {"run_directory": path, "resume": (path / "run.json").exists(), "console": self.console}

    def prepare_text(self) -> dict[str, Any]:
        """Corpus, tokenizer and token shards."""
        self.heading("corpus and tokenizer")
        data, tokenizer_path = self.out / "data", self.out / "tokenizer"
        corpus_path = data / "corpus"
        corpus: Corpus = open_corpus(corpus_path) if corpus_path.exists() else build_corpus(corpus_path)
        for source in corpus.manifest["sources"]:
            name = f"{source['name']} ({source['package']} {source['version']}, {source['licence']})"
            self.console.print(f"  {source['bytes'] / 1e6:6.2f} MB  {source['documents']:6,} documents  {name}")
        if not (tokenizer_path / "chat_template.jinja").exists():  # the last file that `save` writes
            Tokenizer.train(corpus.texts("train"), vocab_size=self.config.vocab_size).save(tokenizer_path)
        tokenizer = Tokenizer.from_pretrained(tokenizer_path)
        sizes = {}
        for split in ("train", "heldout"):
            path = data / split
            made = open_dataset(path, tokenizer) if path.exists() else tokenize_corpus(corpus, split, tokenizer, path)
            sizes[split] = {"bytes": made.manifest["bytes"], "tokens": made.manifest["tokens"]}
        self.console.print(f"  {tokenizer.vocab_size:,} tokens learned; {sizes['train']['tokens']:,} to train on")
        return {"sources": corpus.manifest["sources"], "sizes": sizes}

    def pretrain(self) -> dict[str, Any]:
        """Random weights to a language model, held against a compressor and a bigram model."""
        self.heading("pretrain")
        config = PretrainConfig(
            model=self.config,
            tokenizer=self.out / "tokenizer",
            train_data=self.out / "data/train",
            heldout_data=self.out / "data/heldout",
            mtp_steps=1,
        )
        done = pretrain(with_steps(config, self.options.pretrain_steps), **self.run_directory("pretrain"))
        return self.show_bits_per_byte(done)

    def show_bits_per_byte(self, done: RunDirectory) -> dict[str, Any]:
        found = json_text.loads((done.path / "evaluation.json").read_text(encoding="utf-8"))
        self.console.print(f"  held-out text: {found['heldout']['bits_per_byte']:.3f} bits per byte")
        for name, value in found["sanity_lines"].items():
            self.console.print(f"  {name}: {value:.3f}", style="dim")
        sample = sorted((done.path / "samples").glob("*.txt"))
        if sample:
            self.console.print(sample[-1].read_text(encoding="utf-8"), style="italic", markup=False, highlight=False)
        return {"bits_per_byte": found["heldout"]["bits_per_byte"], "sanity_lines": found["sanity_lines"]}

    def compare_with_transformers(self) -> dict[str, Any] | None:
        """The saved directory, read by our loader and by transformers: largest relative difference of logits."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            self.console.print("  transformers is not installed, so the saved model is not compared with it")
            return None
        logging.set_verbosity_error()
        directory = self.out / "pretrain" / "model"
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        prompt = "def forward(self, input): returns the sum of all elements in the tensor. " * 8
        ids = torch.tensor([AutoTokenizer.from_pretrained(directory)(prompt).input_ids])
        with torch.no_grad():
            expected = theirs(ids).logits
            ours = load_model(directory, dtype=torch.float32)(ids).logits
        difference = float((ours - expected).abs().max() / expected.abs().max())
        self.console.print(f"  transformers reads it too: logits agree to {difference:.1e} over {ids.numel()} tokens")
        return {"relative_difference": difference, "tokens": ids.numel()}

    def warm_up_indexer(self) -> dict[str, Any]:
        """Sparse attention learns what to select."""
        self.heading("dsa: the lightning indexer learns what to attend to")
        config = DSAConfig(
            parent=self.out / "pretrain", train_data=self.out / "data/train", heldout_data=self.out / "data/heldout"
        )
        done = warm_up_indexer(with_steps(config, self.options.dsa_steps), **self.run_directory("dsa"))
        return self.show_bits_per_byte(done)

    def sft(self) -> None:
        """Conversations that answer arithmetic."""
        self.heading("sft: chat-formatted arithmetic")
        tokenizer = Tokenizer.from_pretrained(self.out / "tokenizer")
        chats = self.out / "data/arithmetic"
        if not chats.exists():
            made = problems(seed=0, count=4000, largest=LARGEST, operations=OPERATIONS)
            write_dataset(chats, chat_documents((p.messages() for p in made), tokenizer), tokenizer)
        config = SFTConfig(parent=self.out / "dsa", train_data=chats, attention="sparse")
        sft(with_steps(config, self.options.sft_steps or SFT_STEPS), **self.run_directory("sft"))

    def rl(self) -> dict[str, Any]:
        """Policy gradients on the same arithmetic; the reward is whether the number is right."""
        self.heading("rl: policy gradients on arithmetic")
        config = RLConfig(
            parent=self.out / "sft",
            steps=self.options.rl_steps or RL_STEPS,
            prompts_per_step=16,
            group_size=8,
            max_tokens=6,
            optimizer=RL_OPTIMIZER,
        )
        env = Arithmetic(split="train", largest=LARGEST, operations=OPERATIONS)
        done = train_policy(config, env, **self.run_directory("rl"))
        rewards = [line["reward"] for line in done.read("metrics")]
        part = max(1, len(rewards) // 5)
        first, last = sum(rewards[:part]) / part, sum(rewards[-part:]) / part
        self.console.print(f"  mean reward {first:.3f} in the first {part} steps, {last:.3f} in the last {part}")
        return {"steps": len(rewards), "reward_first_fifth": first, "reward_last_fifth": last}

    def evaluate(self, stage: str) -> dict[str, Any]:
        """Greedy answers to problems that no stage has trained on, and to problems that SFT and RL have seen."""
        self.heading(f"evaluation of {stage}")
        engine = Engine(self.out / stage / "model", dtype=torch.float32)
        found = {}
        for split in ("heldout", "train"):
            env = Arithmetic(split=split, largest=LARGEST, operations=OPERATIONS)
            result, answers = evaluate(engine, env, EvalConfig(tasks=self.options.eval_tasks))
            write_evaluation(self.out / "evaluation" / stage / split, result, answers)
            self.console.print(f"  {split} problems: {result.accuracy}", highlight=False)
            found[split] = accuracy_of(result)
        return found


def accuracy_of(result: EvalResult) -> dict[str, float]:
    """The share of right answers with its interval."""
    return {"accuracy": result.accuracy.value, "low": result.accuracy.low, "high": result.accuracy.high}


def with_steps(config: StageConfig, steps: int | None) -> StageConfig:
    """The same stage with another number of steps."""
    if steps is None:
        return config
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps))
