"""`Tokenizer`: byte-level BPE with GLM-5's special tokens and chat template.

The work is done by the `tokenizers` library. A tokenizer is read from a Hugging Face directory (the published models'
`tokenizer.json` is a plain file of that library), or trained on text for the small presets; saved, it is a directory
that `transformers.AutoTokenizer` loads. The chat template of the directory is used when it has one, ours otherwise.

Special tokens in text are a door for injection: a web page that contains `<|user|>` would speak as the user. Two ways
to shut it: `encode(text, allow_special=False)` for documents, `apply_chat_template(..., escape_special=True)` for
conversations. The defaults follow the published template, which leaves the door open.

Left out on purpose: padding, truncation and tensors (the loader and the engine know better), images.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, overload

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from glm5.errors import TextError, did_you_mean
from glm5.text.messages import disarm, prepare_messages, prepare_tools
from glm5.text.specials import CHAT_TOKENS, CONTROL_TOKENS, PAD_TOKEN, SPECIAL_TOKENS, TERMINATORS
from glm5.text.template import CHAT_TEMPLATE, EFFORTS, render

# Words with one leading non-letter, runs of up to DIGITS digits, punctuation with its newlines, white space.
_PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

_CONFIG = {
    "clean_up_tokenization_spaces": False,
    "eos_token": PAD_TOKEN,
    "extra_special_tokens": list(CONTROL_TOKENS),
    "model_max_length": 202_752,
    "pad_token": PAD_TOKEN,
    "padding_side": "left",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


class Tokenizer:
    """Text to token identities and back, and conversations to prompts. Immutable, picklable, safe between threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: str = CHAT_TEMPLATE, config: Mapping[str, Any] = _CONFIG
    ) -> None:
        """`backend` must be byte-level and have GLM-5's chat tokens as added tokens; else `TextError`."""
        self.backend = backend
        self.chat_template = chat_template
        self.config = dict(config)
        added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
        self.special_ids: dict[str, int] = dict(sorted(added.items(), key=lambda item: item[1]))
        missing = [token for token in CHAT_TOKENS if token not in added]
        if missing:
            raise TextError(f"this is not a tokenizer of GLM-5: it has no special token {missing[0]!r}")
        if "ByteLevel" not in str(backend.decoder):
            raise TextError("this is not a tokenizer of GLM-5: it is not byte-level")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Reads `tokenizer.json` and, where present, `tokenizer_config.json` and `chat_template.jinja`."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TextError(f"no tokenizer.json in {directory}; give a directory that holds one")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise TextError(f"{path} is not a readable tokenizer: {error}") from None
        config = dict(_CONFIG)
        template: Any = CHAT_TEMPLATE
        if (config_path := directory / "tokenizer_config.json").is_file():
            try:
                config = json.loads(config_path.read_text(encoding="utf-8"))
                if not isinstance(config, dict):
                    raise ValueError(f"it holds a {type(config).__name__}")
            except ValueError as error:
                raise TextError(f"{config_path} is not a JSON object: {error}") from None
            template = config.pop("chat_template", None) or CHAT_TEMPLATE
            if isinstance(template, list):  # several named templates, the older layout
                template = {entry["name"]: entry["template"] for entry in template}.get("default", CHAT_TEMPLATE)
        if (template_path := directory / "chat_template.jinja").is_file():
            template = template_path.read_text(encoding="utf-8")
        try:
            return cls(backend, template, config)
        except TextError as error:
            raise TextError(f"{path}: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096, *, digits: int = 3) -> Self:
        """Learns a vocabulary of at most `vocab_size` tokens: the special tokens, the 256 bytes, then merges.

        `digits`: most digits in one token, 3 in the published tokenizers. A small model that is to calculate wants 1:
        it has seen each digit often, but few of the numbers up to 999. The same texts give the same tokenizer. Fewer
        tokens come out when the texts have too few repeated pairs.
        """
        if not 1 <= digits <= 9:
            raise TextError(f"digits is {digits}; a token holds between 1 and 9 digits")
        if vocab_size < SMALLEST_VOCABULARY:
            raise TextError(
                f"a vocabulary of {vocab_size} is too small: special tokens and bytes need {SMALLEST_VOCABULARY}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PRE_TOKEN.replace("DIGITS", str(digits))), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        # The trainer marks all of them as control tokens; the tags of reasoning and tool calls are not.
        state = json.loads(backend.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["content"] in CONTROL_TOKENS
        return cls(tokenizers.Tokenizer.from_str(json.dumps(state)))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, each whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        _write(directory / "tokenizer_config.json", json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")
        _write(directory / "chat_template.jinja", self.chat_template)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included. A model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def pad_id(self) -> int:
        return self.special_ids[PAD_TOKEN]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """`<|endoftext|>`, `<|user|>`, `<|observation|>`: what ends an assistant turn."""
        return tuple(self.special_ids[token] for token in TERMINATORS)

    def token_to_id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise TextError(f"the vocabulary has no token {token!r}.{did_you_mean(token, self.special_ids)}")
        return token_id

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token identities. With `allow_special=False`, `<|user|>` in the text is plain characters, not a role.

        Raises `TextError` for half of a surrogate pair, which JSON or undecodable bytes leave in a string.
        """
        return _encoded(self.backend if allow_special else self._plain, text)

    def encode_batch(self, texts: Sequence[str], allow_special: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all the threads that the library may use."""
        backend = self.backend if allow_special else self._plain
        try:
            return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            for text in texts:
                _check(text)
            raise

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, identities beyond the vocabulary nothing.

        `skip_special_tokens` drops control tokens and keeps the tags of reasoning and tool calls.
        """
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool = ..., enable_thinking: bool = ..., clear_thinking: bool | None = ...,
        tokenize: Literal[True] = ..., *, reasoning_effort: str | None = ..., escape_special: bool = ...,
        variables: Mapping[str, Any] | None = ...,
    ) -> list[int]: ...  # fmt: skip

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool = ..., enable_thinking: bool = ..., clear_thinking: bool | None = ...,
        tokenize: Literal[False] = ..., *, reasoning_effort: str | None = ..., escape_special: bool = ...,
        variables: Mapping[str, Any] | None = ...,
    ) -> str: ...  # fmt: skip

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = True,
        clear_thinking: bool | None = None,
        tokenize: bool = True,
        *,
        reasoning_effort: str | None = None,
        escape_special: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int] | str:
        """The prompt of a conversation, as token identities (or as text, with `tokenize=False`).

        `clear_thinking`: False keeps the reasoning of all earlier turns, which agents need; None is the template's
        default (clear, for GLM-5, 5.1 and 5.2). `reasoning_effort`: "low", "high" or "max" (GLM-5.2).
        `escape_special`: special tokens inside messages and tools become plain text; needs `tokenize`, because only
        token identities can tell the two apart. `variables` go to the template as they are.
        """
        if escape_special and not tokenize:
            raise TextError("escape_special needs tokenize=True: as text, an escaped token looks like a real one")
        text, marker = self.rendered(
            messages, tools, add_generation_prompt, enable_thinking, clear_thinking,
            reasoning_effort=reasoning_effort, escape_special=escape_special, variables=variables,
        )  # fmt: skip
        return self.encode_rendered(text, marker) if tokenize else text

    def rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = True,
        clear_thinking: bool | None = None,
        *,
        reasoning_effort: str | None = None,
        escape_special: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, str]:
        """The text of a prompt, and the character that breaks its escaped special tokens; "" when none are."""
        if reasoning_effort not in (None, *EFFORTS):
            raise TextError(f"reasoning_effort is {reasoning_effort!r}; use 'low', 'high' or 'max'")
        plain_messages, plain_tools, marker = prepare_messages(messages), prepare_tools(tools), ""
        if escape_special:
            plain_messages, plain_tools, marker = disarm(plain_messages, plain_tools, self._special)
        given = {"clear_thinking": clear_thinking, "reasoning_effort": reasoning_effort}
        text = render(
            self.chat_template,
            {
                "messages": plain_messages,
                "tools": plain_tools,
                "add_generation_prompt": add_generation_prompt,
                "enable_thinking": enable_thinking,
                **{name: value for name, value in given.items() if value is not None},
                **(variables or {}),
            },
        )
        return text, marker

    def encode_rendered(self, text: str, marker: str) -> list[int]:
        """Identities of what `rendered` gave, or of a part of it."""
        return self._encode_around(text, marker) if marker else self.encode(text)

    def _encode_around(self, text: str, marker: str) -> list[int]:
        """Identities of a rendered text in which `marker` breaks the special tokens that are to be plain text."""
        ids: list[int] = []
        for piece in self._special.split(text):
            if piece in self.special_ids:
                ids.append(self.special_ids[piece])
            elif piece:
                ids += _encoded(self._plain, piece.replace(marker, ""))
        return ids

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Any special token, the longest first; one group, so that `split` keeps them."""
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same vocabulary without added tokens: no text can become a special token."""
        state = json.loads(self.backend.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps({**state, "added_tokens": [], "post_processor": None}))


def _encoded(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except TypeError:  # all that the library says of a string that UTF-8 cannot write
        _check(text)
        raise


def _check(text: Any) -> None:
    """Raises `TextError` for what is no text."""
    if not isinstance(text, str):
        raise TextError(f"a text to encode is of type {type(text).__name__}; give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"character {error.start} of a text is {text[error.start]!r}, half of a surrogate pair; "
            "read the text as UTF-8 with errors='replace'"
        ) from None


def _write(path: Path, text: str) -> None:
    """Writes beside, flushes to the disk, renames."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
