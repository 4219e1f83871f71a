"""GLM-5's special tokens, in the published order.

In the published tokenizer they follow the 154,820 byte-level tokens; in the small tokenizers of this project they come
first. So the identity of a token in a small vocabulary is its published identity minus 154,820, and never changes when
a tokenizer is trained again. The first eighteen are control tokens, which `decode(skip_special_tokens=True)` drops; the
tags of reasoning and tool calls are ordinary added tokens, which stay in the text for the parsers to read.
"""

from __future__ import annotations

PUBLISHED_OFFSET = 154_820
"""Identity of `<|endoftext|>` in the tokenizer of the published models."""

CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
)  # fmt: skip

SPECIAL_TOKENS = (
    *CONTROL_TOKENS,
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip

PAD_TOKEN = "<|endoftext|>"

TERMINATORS = ("<|endoftext|>", "<|user|>", "<|observation|>")
"""An assistant turn ends with the next role token, or with the end of the text."""

CALL_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

CHAT_TOKENS = (
    *TERMINATORS, "[gMASK]", "<sop>", "<|system|>", "<|assistant|>", "<think>", "</think>", *CALL_TAGS,
)  # fmt: skip
"""What a tokenizer must have to speak GLM-5's chat format."""
