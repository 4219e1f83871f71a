"""Conversations in which the assistant calls a tool of `glm5.data.tools`, reads the result and answers.

A request has a train or a held-out wording; its arguments are drawn anew (numbers, taught towns, names that nobody
bears), so a call is copied from the question and not from memory. Some conversations show a wrong call first, which is
kept and masked, the tool's complaint, and the right call.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glm5.data.addition import number_is_held_out
from glm5.data.chat import Chat
from glm5.data.corpus import Split
from glm5.data.tools import ALARM, CALCULATOR, SPELLER, TOOLS, WEATHER, run_tool
from glm5.data.world_names import NameDrawer

PHRASINGS: dict[str, dict[Split, tuple[str, ...]]] = {
    "calculator": {
        "train": ("Use the calculator: {a} {operation} {b}.", "With the calculator, what is {a} {operation} {b}?",
                  "Let the calculator find {a} {operation} {b}.", "I need {a} {operation} {b} from the calculator.",
                  "Calculate {a} {operation} {b}.", "Work out {a} {operation} {b} with the calculator."),
        "heldout": ("Please calculate {a} {operation} {b} with the calculator.",),
    },
    "get_weather": {
        "train": ("What is the weather in {town}?", "How is the weather in {town} today?",
                  "Tell me the weather in {town}.", "Is the weather in {town} good?",
                  "Please look up the weather in {town}.", "I would like the weather in {town}."),
        "heldout": ("I want to know the weather in {town}.",),
    },
    "set_alarm": {
        "train": ("Set an alarm for {hour}:{minute}.", "Wake me at {hour}:{minute}.",
                  "Please set the alarm to {hour}:{minute}.", "I need an alarm at {hour}:{minute}.",
                  "Let the alarm ring at {hour}:{minute}.", "Alarm at {hour}:{minute}, please."),
        "heldout": ("Can you set an alarm at {hour}:{minute}?",),
    },
    "count_letters": {
        "train": ("How many letters are in {word}?", "Count the letters of {word}.", "How long is the word {word}?",
                  "Please count the letters in {word}.",
                  "Of how many letters does {word} consist?", "The number of letters in {word}, please."),
        "heldout": ("What number of letters does {word} have?",),
    },
}  # fmt: skip
ANSWERS = {
    "calculator": "{result}",
    "get_weather": "It is {result} in {town}.",
    "set_alarm": "The alarm is set for {result}.",
    "count_letters": "{word} has {result} letters.",
}


@dataclass(frozen=True)
class ToolRequest:
    """What the user asks, the tools on offer, and the one call that is right."""

    question: str
    tools: tuple[dict[str, Any], ...]
    name: str
    arguments: dict[str, Any]

    def call(self, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """The assistant message with the right call, or with other arguments."""
        function = {"name": self.name, "arguments": self.arguments if arguments is None else arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    def messages(self, draw: random.Random, wrong_share: float) -> list[dict[str, Any]]:
        """Question, call, result and answer, now and then with a wrong call in front that is not learned."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": self.question}]
        if draw.random() < wrong_share:
            wrong = dict(self.arguments)
            del wrong[draw.choice(list(wrong))]
            messages += [{**self.call(wrong), "train": False}, {"role": "tool", "content": run_tool(self.name, wrong)}]
        result = run_tool(self.name, self.arguments)
        answer = ANSWERS[self.name].format(result=result.split(": ", 1)[1].strip('"}'), **self.arguments)
        return [
            *messages, self.call(), {"role": "tool", "content": result}, {"role": "assistant", "content": answer},
        ]  # fmt: skip


class ToolRequests:
    """Draws requests; the same seed and split give the same ones."""

    def __init__(self, seed: int, towns: Sequence[str], split: Split = "train", tools_shown: int = 2) -> None:
        self._draw = random.Random(f"tool requests {seed} {split}")
        self._names = NameDrawer(f"tool requests {seed} {split}", avoid=towns)
        self._towns, self._split, self._shown = list(towns), split, tools_shown

    def chat(self, wrong_share: float, count: int) -> Chat:
        """A conversation of `count` requests with the same tools on offer; those are most of its tokens."""
        first = self.request()
        requests = [first, *(self.request(first.tools) for _ in range(count - 1))]
        messages = [message for request in requests for message in request.messages(self._draw, wrong_share)]
        return Chat(tuple(messages), first.tools, "tools")

    def request(self, tools: Sequence[dict[str, Any]] | None = None) -> ToolRequest:
        """The right tool and others in any order; held-out requests differ in wording, numbers and names."""
        draw = self._draw
        tools = draw.sample(TOOLS, self._shown) if tools is None else tools
        tool = draw.choice(tools)
        name = tool["function"]["name"]
        arguments = self._arguments(tool)
        text = draw.choice(PHRASINGS[name][self._split])
        shown = {**arguments, "minute": f"{arguments['minute']:02}"} if tool is ALARM else arguments
        return ToolRequest(text.format(**shown), tuple(tools), name, arguments)

    def _arguments(self, tool: dict[str, Any]) -> dict[str, Any]:
        draw = self._draw
        if tool is CALCULATOR:
            operation = draw.choice(["plus", "minus", "times"])
            return {"a": self._number(), "operation": operation, "b": self._number()}
        if tool is ALARM:
            return {"hour": draw.randrange(24), "minute": draw.randrange(0, 60, 5)}
        assert tool in (WEATHER, SPELLER)
        key = "town" if tool is WEATHER else "word"
        if self._split == "train" and draw.random() < 0.5:
            return {key: draw.choice(self._towns)}
        return {key: self._names.name("town")}

    def _number(self) -> int:
        while True:
            number = self._draw.randrange(1000)
            if number_is_held_out(number) == (self._split == "heldout"):
                return number
