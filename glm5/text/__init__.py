"""Text: the tokenizer, the chat template, and the parsers of what the model writes."""

from glm5.text.detokenizer import Detokenizer, token_bytes
from glm5.text.parser import AssistantStream, parse_assistant
from glm5.text.specials import CONTROL_TOKENS, SPECIAL_TOKENS, TERMINATORS
from glm5.text.splice import Written, spliced_prompt
from glm5.text.template import CHAT_TEMPLATE
from glm5.text.tokenizer import Tokenizer
from glm5.text.training import render_for_training

__all__ = [
    "AssistantStream", "CHAT_TEMPLATE", "CONTROL_TOKENS", "Detokenizer", "SPECIAL_TOKENS", "TERMINATORS", "Tokenizer",
    "Written", "parse_assistant", "render_for_training", "spliced_prompt", "token_bytes",
]  # fmt: skip
