"""`Detokenizer`: token identities to text as they arrive, never half a character.

A byte-level token is a run of bytes, and a character may span tokens. The bytes go through an incremental UTF-8
decoder, so each piece is printable at once, the cost per token is constant, and the pieces together are exactly
`Tokenizer.decode` of all identities.
"""

from __future__ import annotations

import codecs

from glm5.text.tokenizer import Tokenizer


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their byte, the others for 256, 257, ... in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of one token; empty for an identity beyond the vocabulary (a model's vocabulary may be padded)."""
    token = tokenizer.backend.id_to_token(token_id)
    if token is None:
        return b""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # an added token outside the byte alphabet is its own text
        return token.encode()


class Detokenizer:
    """Text of one sequence, piece by piece: `feed` what was sampled, `finish` once at the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        """`skip_special_tokens` drops control tokens and keeps the tags of reasoning and tool calls."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        added = tokenizer.backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {i for i, token in added.items() if token.special}

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; empty inside a character of several tokens."""
        return self._decoder.decode(b"" if token_id in self._skipped else token_bytes(self._tokenizer, token_id))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never became whole, else nothing."""
        return self._decoder.decode(b"", final=True)
