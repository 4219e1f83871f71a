"""The learner: a batch goes in, the weights move by one version, metrics come out. A function of (state, batch).

The state is weights, optimiser moments and a version; nothing is drawn at random, so the batches of a journal give the
same weights to the bit whenever they are learnt from again. Micro-batches of rows add up to the gradient of the whole
batch (`packing.py`); with one update per batch and the loss of reasoning RL the step is that of `plain/update.py`.

What learns: everything but the indexers, whose choice of tokens must not drift from what the engine chose (GLM-5
report, section 3.2), and the router's correction biases; or adapters alone.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from glm5.errors import ConfigError, InputError, RunError
from glm5.model import GLM5
from glm5.optim import build_optimizers, clip_gradients, rate_at, set_rate
from glm5.rl.adapters import adapt, adapter_tensors, engine_model, merged_model, merged_weights, without_adapters
from glm5.rl.aids import Aids, check_vocabularies
from glm5.rl.critic import ValueHead, estimates
from glm5.rl.distillation import teacher_logprobs
from glm5.rl.forward import PerExample, fixed_logprobs
from glm5.rl.learner_config import LearnerConfig
from glm5.rl.objective import Given, drafts, mismatch, objective, totals_of
from glm5.rl.packing import Example, Judged, examples_of, judged, micro_batches
from glm5.rl.records import Batch, Metrics, Rollout
from glm5.rl.seen import TrainerLogprobs
from glm5.train import RunDirectory
from glm5.train.guards import LOWER_RATE
from glm5.train.losses import language_loss

__all__ = ["Learner", "LearnerConfig"]


class Learner:
    """Trains `model` in place. `version` counts the batches that were learnt from, `steps` are those of the run.

    publish_every: versions between two that the engines take. temperature: at which the policy samples.
    """

    def __init__(
        self,
        model: GLM5,
        config: LearnerConfig,
        *,
        version: int = 0,
        steps: int | None = None,
        aids: Aids | None = None,
        publish_every: int = 1,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.config, self.version, self.aids = model, config, version, aids or Aids()
        if steps is None and config.schedule.shape != "constant":
            raise ConfigError(
                f"A {config.schedule.shape} schedule needs the number of steps; give the learner `steps`."
            )
        check_vocabularies(model, self.aids)
        self.steps, self.publish_every = steps or 1, publish_every
        self.passes = replace(config.passes, temperature=temperature)
        self.reference = self.aids.reference
        if config.kl is not None and self.reference is None and config.lora is None:
            self.reference = copy.deepcopy(model)
        if config.lora is not None:
            adapt(model, config.lora)
        else:
            check_patterns(model, config)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(learns(name, model, config))
        self.logprobs: TrainerLogprobs = {}
        """Of the newest batch, before it was learnt from."""
        self.head: ValueHead | None = None
        self._of_policy = build_optimizers(model, model.config, config.optimizer)
        self.optimizers = [*self._of_policy]
        """These, and that of the critic."""
        if config.advantages == "gae":
            self.head = ValueHead(model.config.hidden_size)
            group = {"params": list(self.head.parameters()), "lr": config.critic.lr, "peak_lr": config.critic.lr}
            self.optimizers.append(torch.optim.AdamW([group], weight_decay=0.0))

    # ---- learning -------------------------------------------------------------------------------------------------
    def step(self, batch: Batch) -> Metrics:
        """Learns from a batch of this version; afterwards the weights are those of the next version.

        Raises InputError for a batch of another version, and RunError for rewards that have no mean and for a loss or
        gradient that is not finite, before that update changes the weights, unless `on_trouble` is "skip".
        """
        if batch.version != self.version:
            raise InputError(f"The batch is of version {batch.version} and the learner at version {self.version}.")
        config = self.config
        fraction = rate_at(config.schedule, self.version, self.steps)
        set_rate(self.optimizers, fraction)
        kept = self.measured(self.version)
        sums: defaultdict[str, float] = defaultdict(float)
        lessons = self._lessons(batch)
        parts = [
            examples_of(part, config.normalisation, fixed_length=config.fixed_length, version=batch.version)
            for part in _parts(lessons, config.updates)
            if part
        ]
        given, before = self._given(list(itertools.chain(*parts)), several=len(parts) > 1), PerExample()
        taken: list[list[Example]] = []
        for number, part in enumerate(parts):
            values = self._update(part, given, number, before)
            if values is not None:
                taken.append(part)
                for name, value in values.items():
                    sums[name] += value
        self.logprobs = {
            rollout.id: [before[id(t)].tolist() if t.num_sampled else [] for t in rollout.trajectories]
            for rollout in batch.rollouts
            if any(id(t) in before for t in rollout.trajectories)
        }
        means = {name: value / len(taken) for name, value in sums.items()}
        means |= mismatch(list(itertools.chain(*taken)), before)
        self.version += 1
        if config.reset_optimizer and self.version % self.publish_every == 0:
            self.reset_optimizer()
        values = {"lr": fraction * config.optimizer.lr, "updates": len(taken),
                  "skipped_updates": len(parts) - len(taken)}  # fmt: skip
        return {**means, **values, **batch_metrics(batch, [one.lesson.rollout for one in lessons]), **kept}

    def _lessons(self, batch: Batch) -> list[Judged]:
        """What is learnt from; a baseline is of all rollouts, also those that are masked."""
        try:
            lessons = judged(batch, self.config.advantages)
        except (ArithmeticError, ValueError) as error:  # of an older journal: too large ones are no longer taken
            worst = max(batch.rollouts, key=_size_of_reward)
            raise RunError(
                f"The rewards of batch {batch.step} cannot be compared ({error}); the one of {worst.id} is "
                f"{worst.reward and worst.reward.value}. Start a new run, with smaller rewards."
            ) from error
        if self.config.truncated == "mask":
            lessons = [one for one in lessons if one.lesson.rollout.outcome != "truncated"]
        return lessons

    def reset_optimizer(self) -> None:
        """Forgets the moments of the policy: its next update is as if it were the first. The critic keeps its own."""
        for optimizer in self._of_policy:
            optimizer.state.clear()

    def _given(self, examples: Sequence[Example], *, several: bool) -> Given:
        """What other policies say of the batch, and the critic."""
        config = self.config
        if not examples:
            return Given()
        return Given(
            old=fixed_logprobs(self.model, examples, self.passes, replay=True) if several else None,
            reference=self._reference_logprobs(examples) if config.kl is not None else None,
            teacher=teacher_logprobs(self.aids.teachers, examples, self.passes) if self.aids.teachers else None,
            critic=None if self.head is None else estimates(
                self.head, self.model, examples, self.passes, config.critic
            ),
        )  # fmt: skip

    def _reference_logprobs(self, examples: Sequence[Example]) -> PerExample:
        if self.reference is not None:
            return fixed_logprobs(self.reference, examples, self.passes)
        with without_adapters(self.model):
            return fixed_logprobs(self.model, examples, self.passes)

    def _update(
        self, examples: Sequence[Example], given: Given, number: int, before: PerExample
    ) -> dict[str, float] | None:
        """One optimiser step, and what it met; None when it was left out. Adds to `before`."""
        values = self.backward(examples, given, before)
        if self.aids.replay is not None and self.config.replay_weight:
            batch = self.aids.replay.batch(self.version * self.config.updates + number)
            replayed = language_loss(self.model, batch, attention=self.config.attention, most=self.passes.logits).total
            (self.config.replay_weight * replayed).backward()
            values["replay"] = replayed.item()
        values |= self._clip()
        healthy = self._healthy(values, number)
        for optimizer in self.optimizers:
            if healthy:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return values if healthy else None

    def backward(self, examples: Sequence[Example], given: Given, before: PerExample | None = None) -> dict[str, float]:
        """Adds the gradient of one update to the parameters; gives loss and diagnostics.

        before: is filled with the log-probabilities that the tokens had before the batch.
        """
        config, totals = self.config, totals_of(self.model, examples, self.config.normalisation)
        drafters = [p for p in self.model.mtp.parameters() if p.requires_grad]
        sums: defaultdict[str, float] = defaultdict(float)
        for rows in micro_batches(examples, self.passes):
            found = objective(self.model, self.head, rows, config, given, totals, self.passes)
            found.policy.backward(retain_graph=found.draft is not None)
            if found.draft is not None:
                found.draft.backward(inputs=drafters)
            if found.value is not None:
                found.value.backward()
            sums["loss"] += found.policy.item()
            for name, value in found.diagnostics.items():
                sums[name] += value.item()
            if before is not None:
                before |= found.before
        return dict(sums)

    def _clip(self) -> dict[str, float]:
        """Clips the gradients part by part, so that none scales another's step; gives their norms before."""
        parts: dict[str, list[nn.Parameter]] = {"grad_norm": []}
        for name, parameter in self._parameters():
            if parameter.grad is not None:
                parts.setdefault(_norm_of(name), []).append(parameter)
        return {name: clip_gradients(some, self.config.clip_norm) for name, some in parts.items()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()
        if self.head is not None:
            yield from self.head.named_parameters(prefix="critic")

    def _healthy(self, values: dict[str, float], number: int) -> bool:
        watched = {name: value for name, value in values.items() if name == "loss" or name.endswith("grad_norm")}
        trouble = next((f"{name} is {value}" for name, value in watched.items() if not math.isfinite(value)), None)
        if trouble is None or self.config.on_trouble == "skip":
            return trouble is None
        where = f"batch {self.version}" if self.config.updates == 1 else f"update {number + 1} of batch {self.version}"
        raise RunError(
            f"The {trouble} in {where}, before it changed the weights; look at the batch's rollouts, then "
            f"{LOWER_RATE}, or resume with on_trouble='skip' to leave such updates out."
        )

    # ---- what leaves, and what stays ------------------------------------------------------------------------------
    def weights(self) -> dict[str, Tensor]:
        """What the engines take of `version`: those of `engine_model`, or of its adapters, the learner's own tensors.

        A publisher copies them before the next step.
        """
        lora = self.config.lora
        if lora is None:
            return dict(self.model.state_dict())
        return merged_weights(self.model) if lora.sync == "merged" else adapter_tensors(self.model)

    def engine_model(self) -> GLM5:
        """The model that an engine copies at the start, so that it can take `weights` from then on."""
        return self.model if self.config.lora is None else engine_model(self.model, self.config.lora)

    def whole_model(self) -> GLM5:
        """The policy as a plain model: the learner's own, or a new one that computes the same without adapters."""
        return self.model if self.config.lora is None else merged_model(self.model)

    def measured(self, version: int | None) -> dict[str, float]:
        """What is due at the version (None: everything), of the policy as a plain model, which engines run fast."""
        return self.aids.measured(self.whole_model(), version) if self.aids.due(version) else {}

    @property
    def module(self) -> nn.Module:
        """All that a checkpoint holds beside the optimisers."""
        return self.model if self.head is None else nn.ModuleDict({"policy": self.model, "critic": self.head})

    def save(self, run: RunDirectory, *, keep: int = 2, wait: bool = True) -> None:
        """A checkpoint under the number of the version."""
        run.save_checkpoint(self.version, self.module, self.optimizers, keep=keep, wait=wait)

    def load(self, run: RunDirectory) -> int:
        """Goes on from the run's newest checkpoint, if it has one; gives the version."""
        self.version = run.load_checkpoint(self.module, self.optimizers)
        return self.version


def learns(name: str, model: GLM5, config: LearnerConfig) -> bool:
    """Whether the parameter of that name is trained, without adapters."""
    if any(fnmatchcase(name, pattern) for pattern in config.freeze):
        return False
    if ".indexer." in name:
        return config.indexer_weight > 0 and not name.startswith("mtp.")
    return not name.startswith("mtp.") or drafts(model, config)


def check_patterns(model: GLM5, config: LearnerConfig) -> None:
    """Raises ConfigError for a pattern of `freeze` that is no parameter's, and when a loss has nothing left to move."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"freeze: no parameter is called {pattern!r}; a name is {names[len(names) // 2]!r}.")
    left = [name for name in names if learns(name, model, config)]
    drafters = any(name.startswith("mtp.") for name in left)
    if all(name.startswith("mtp.") for name in left) and not (drafters and config.mtp == "joint"):
        raise ConfigError("Nothing is left to learn: freeze takes every parameter of the policy; leave some out.")
    if drafts(model, config) and config.mtp == "detached" and not drafters:
        raise ConfigError("freeze takes every parameter of the MTP modules; say mtp='frozen' (--learner.mtp frozen).")


def batch_metrics(batch: Batch, rollouts: Sequence[Rollout]) -> Metrics:
    """What was learnt from: rollouts, their tokens and ages; and the rewards of all of the batch, repeats counted."""
    rewards = [reward for group in batch.groups for reward in group.rewards]
    ages = [batch.version - version for rollout in rollouts for version in rollout.versions]
    return {
        **({"reward": sum(rewards) / len(rewards)} if rewards else {}),
        "rollouts": len(rollouts),
        "trained_tokens": len(ages),
        "staleness": sum(ages) / len(ages) if ages else 0.0,
        "max_staleness": max(ages, default=0),
    }


def _size_of_reward(rollout: Rollout) -> float:
    """How far from 0; what is no number is the farthest."""
    value = math.nan if rollout.reward is None else abs(rollout.reward.value)
    return math.inf if math.isnan(value) else value


def _norm_of(name: str) -> str:
    """The metric that a parameter's gradient counts in."""
    if ".indexer." in name:
        return "indexer_grad_norm"
    part = name.split(".", 1)[0]
    return f"{part}_grad_norm" if part in ("mtp", "critic") else "grad_norm"


def _parts(lessons: list[Judged], updates: int) -> list[list[Judged]]:
    """The lessons cut into so many nearly equal runs."""
    cuts = [len(lessons) * i // updates for i in range(updates + 1)]
    return [lessons[first:last] for first, last in itertools.pairwise(cuts)]
