"""How rollouts are sampled."""

from __future__ import annotations

from dataclasses import dataclass

from glm5.errors import ConfigError
from glm5.train.checks import check_counts, check_numbers


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Settings of every rollout. Nothing is cut off the distribution, as the losses assume."""

    seed: int = 0
    """Of the tasks and of every random number; a ticket and this seed fix both."""
    temperature: float = 1.0
    """At which the policy samples. It is the distribution at this temperature that is learnt: engines report its
    log-probabilities, and the trainer divides its logits by the same number."""
    top_p: float = 1.0
    """Only 1, as `top_k` only 0 and `min_p` only 0: what is learnt are probabilities of the whole distribution, and
    tokens of a cut one are not drawn from that."""
    top_k: int = 0
    """See `top_p`."""
    min_p: float = 0.0
    """See `top_p`."""
    max_tokens: int = 1024
    """Of one turn."""
    stop: tuple[str, ...] = ()
    """Texts that end a turn, such as the end of a call that a program reads, but not in its thought. All tokens that
    were sampled are learnt from, those of the stop too (`stops.py`)."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that do so, in thoughts too."""
    keep_stop: bool = True
    """Whether the environment reads a turn with its stop or only what is before it. Tokens are the same."""
    max_episode_tokens: int | None = None
    """Of the longest prompt with its answer; None: as many as the model takes."""
    thinking: bool = False
    """Whether each prompt opens a thought; a model must have been taught to."""
    keep_thoughts: bool = True
    """Whether thoughts of earlier turns stay in the prompt when a new user message comes."""
    replay_experts: bool = False
    """Record which experts the engine's routers chose, and let the trainer's choose the same (routing replay, R3). A
    token costs a byte or two for each expert of each sparse layer, in the journal too."""
    report_every: int = 32
    """Tokens between two reports of an unfinished turn; what was not reported is sampled again after a crash."""
    episode_seconds: float | None = 3600.0
    """From reset to score, where the environment sets no limit of its own; past it the outcome is `timeout`."""
    step_seconds: float | None = 120.0
    """The same for each call of the environment (a step with its tools, a score); past it that has failed."""
    outage_seconds: float = 300.0
    """For which an environment's server may be away when an episode begins, and a server of engines may be away or
    refuse requests: it is asked again after growing pauses, and only then has it failed. 0: at once. The run's
    patience begins behind it."""

    def __post_init__(self) -> None:
        check_counts(self, "seed", least=0)
        check_numbers(self, "temperature", above=0)
        check_numbers(self, "outage_seconds")
        check_counts(self, "max_tokens", "report_every")
        check_stops(self.stop, self.stop_token_ids)
        for name, whole in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if getattr(self, name) != whole:
                raise ConfigError(
                    f"rollout.{name} is {getattr(self, name)!r}, but rollouts are sampled from the whole distribution, "
                    "whose probabilities are learnt: tokens of a cut one are drawn from another, and no ratio would "
                    f"say so. Leave {name} out; a lower rollout.temperature gives likelier tokens, and is learnt at."
                )
        if self.max_episode_tokens is not None:
            check_counts(self, "max_episode_tokens", least=2)
        for name in ("episode_seconds", "step_seconds"):
            if getattr(self, name) is not None:
                check_numbers(self, name, above=0)

    def check_vocabulary(self, size: int) -> None:
        """Raises ConfigError for a token to stop at that a model of `size` tokens does not have."""
        beyond = [token for token in self.stop_token_ids if token >= size]
        if beyond:
            raise ConfigError(
                f"rollout.stop_token_ids has {beyond[0]}, but the parent's tokens are 0 to {size - 1}; give ids of its "
                "tokenizer."
            )


def check_stops(stop: tuple[str, ...], stop_token_ids: tuple[int, ...]) -> None:
    """Raises ConfigError for what ends no turn, or every one at once."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"rollout.stop is {stop!r}; give a tuple of texts, each of at least one character.")
    if not all(isinstance(token, int) and token >= 0 for token in stop_token_ids):
        raise ConfigError(f"rollout.stop_token_ids is {stop_token_ids!r}; give a tuple of token ids.")
