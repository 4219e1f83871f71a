"""Kill -9 at random moments in every stage of a tiny recipe, resume, compare with the uninterrupted chain, bit by bit.

    python -m benchmarks.kill_resume                         # 20 kills, 4 in each of the five stages
    python -m benchmarks.kill_resume --kills 50 --seed 3 --out docs/results/kill_resume.md

Two chains pretrain -> midtrain -> dsa1 -> dsa2 -> sft grow from the same data: in one every stage runs through, in the
other each is killed and resumed, and starts from the killed chain's own parent. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from glm5.config import PRESETS
from glm5.data import chat_documents, tokenize_corpus, write_dataset
from glm5.data.arithmetic import problems
from glm5.data.corpus import build_corpus
from glm5.data.sources import Source
from glm5.optim import OptimizerConfig, Schedule
from glm5.text import Tokenizer
from glm5.train import DSAConfig, LoopConfig, MidtrainConfig, Phase, PretrainConfig, SFTConfig, SparseConfig
from glm5.train.stages import AnyConfig
from glm5.train.verify_resume import Verdict, fingerprint, mean_step_seconds, run_killed, run_through

STEPS = 24


def tiny_data(root: Path) -> None:
    """A tokenizer, texts and chats about sums, made from a seed."""
    texts = [(str(i), " ".join(f"{p.question} {p.answer}." for p in problems(i, 6))) for i in range(300)]
    source = Source("sums", "glm5", "MIT", lambda: iter(texts))
    corpus = build_corpus(root / "corpus", [source], heldout_per_thousand=60)
    tokenizer = Tokenizer.train(corpus.texts("train"), 384)
    tokenizer.save(root / "tokenizer")
    for split in ("train", "heldout"):
        tokenize_corpus(corpus, split, tokenizer, root / split)
    write_dataset(root / "chat", chat_documents((p.messages() for p in problems(7, 200)), tokenizer), tokenizer)


def stages(data: Path, chain: Path) -> dict[str, AnyConfig]:
    """The five stages of one chain; every one of them saves often and skips spikes."""

    def loop(**changes: Any) -> LoopConfig:
        usual = LoopConfig(
            steps=STEPS, checkpoint_every=5, evaluate_every=8, seed=3, optimizer=OptimizerConfig(lr=3e-3),
            schedule=Schedule(shape="linear", warmup_steps=3),
        )  # fmt: skip
        return dataclasses.replace(usual, **changes)

    model = dataclasses.replace(
        PRESETS["nano"](), vocab_size=384, hidden_size=32, num_hidden_layers=2, mlp_layer_types=(), indexer_types=(),
        num_attention_heads=2, num_key_value_heads=0, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, index_n_heads=4, index_head_dim=16, index_topk=16,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
    )  # fmt: skip
    text: dict[str, Any] = {"train_data": data / "train", "heldout_data": data / "heldout", "heldout_documents": 3}
    adamw = OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.0)
    return {
        "pretrain": PretrainConfig(
            model=model, tokenizer=data / "tokenizer", rows=4, length=48, prompts=("3 + 4",), loop=loop(), **text,
        ),
        "midtrain": MidtrainConfig(
            parent=chain / "pretrain", loop=loop(micro_rows=2), prompts=("3 + 4",), **text,
            phases=(Phase(length=64, rows=4, steps=STEPS // 2), Phase(length=96, rows=2, steps=STEPS - STEPS // 2)),
        ),
        "dsa1": DSAConfig(parent=chain / "midtrain", rows=2, length=96, loop=loop(optimizer=adamw), **text),
        "dsa2": SparseConfig(
            parent=chain / "dsa1", rows=2, length=96, loop=loop(indexer_optimizer=adamw, on_spike="skip"), **text
        ),
        "sft": SFTConfig(
            parent=chain / "dsa2", train_data=data / "chat", rows=4, length=64, attention="sparse", mtp_weight=0.3,
            loop=loop(precision="bf16", checkpoint_activations=True),
        ),
    }  # fmt: skip


def prove(root: Path, kills: int, seed: int) -> dict[str, Verdict]:
    """Both chains under `root`; what each stage left."""
    tiny_data(root / "data")
    draw = random.Random(seed)
    whole, killed = (stages(root / "data", root / chain) for chain in ("whole", "killed"))
    shares = [kills // len(whole) + (i < kills % len(whole)) for i in range(len(whole))]
    verdicts = {}
    for (name, config), share in zip(whole.items(), shares, strict=True):
        paths = root / "whole" / name, root / "killed" / name
        run_through(config, paths[0])
        done = tuple(run_killed(killed[name], paths[1], share, draw, 1, mean_step_seconds(paths[0])))
        verdicts[name] = Verdict(done, fingerprint(paths[0], config), fingerprint(paths[1], killed[name]))
        print(name, "equal" if verdicts[name].equal else verdicts[name].differences, file=sys.stderr, flush=True)
    return verdicts


def table(verdicts: dict[str, Verdict], seed: int, commit: str) -> str:
    """The result as Markdown."""
    asked = sum(len(verdict.kills) for verdict in verdicts.values())
    kills = [(name, kill) for name, verdict in verdicts.items() for kill in verdict.kills if not kill.finished]
    late = f" ({asked - len(kills)} more came after the run had ended)" if len(kills) < asked else ""
    equal = all(verdict.equal for verdict in verdicts.values())
    rows = [
        f"| {i} | {name} | {kill.lines} | {kill.target} | {kill.seconds_after:.3f} |"
        for i, (name, kill) in enumerate(kills, 1)
    ]
    lines = [
        "# Kill -9 and resume, all stages",
        "",
        f"`python -m benchmarks.kill_resume --kills {asked} --seed {seed}` at commit {commit}; "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}, one thread. "
        f"{STEPS} steps a stage, a checkpoint every 5.",
        "",
        f"**{len(kills)} kills{late}: {'all equal, bit for bit' if equal else 'NOT EQUAL'}.**",
        "",
        "| kill | stage | steps written down when it came | aimed behind step | seconds later |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "SHA-256 (first 16 digits) of what the uninterrupted and the killed run left; for the last checkpoint, of its "
        "values.",
        "",
        "| stage | what | uninterrupted | killed and resumed | equal |",
        "|---|---|---|---|---|",
    ]
    for name, verdict in verdicts.items():
        for part in sorted(verdict.whole.keys() | verdict.killed.keys()):
            a, b = (hashes.get(part, "missing")[:16] for hashes in (verdict.whole, verdict.killed))
            lines.append(f"| {name} | {part} | {a} | {b} | {'yes' if part not in verdict.differences else 'NO'} |")
    return "\n".join(lines) + "\n"


def current_commit() -> str:
    """The short hash, marked when files differ from it."""
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    commit, changes = (subprocess.run(c, capture_output=True, text=True).stdout.strip() for c in commands)
    return (commit or "unknown") + (" with changes" if changes else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    commit = current_commit()  # before the proof: it takes a while
    with tempfile.TemporaryDirectory() as root:
        verdicts = prove(Path(root), options.kills, options.seed)
    text = table(verdicts, options.seed, commit)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return 0 if all(verdict.equal for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
