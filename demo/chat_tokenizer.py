"""The demo model's tokenizer: byte-level BPE learnt from the corpus, single digits, ChatML marks, chat template.

Knows nothing of the model or of how it is trained.
Called by train_chat.py; `encode` also by evaluate_chat.py and tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken

from demo.byte_level_bpe import learn
from demo.corpus.conversation import Conversation
from demo.corpus.mixture import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (TEXT_END, TURN_START, TURN_END)
# Added but not special: whoever decodes with skip_special_tokens must still see them, to find the call between them.
CALL_TOKENS = ("<tool_call>", "</tool_call>")
VOCAB_SIZE = 2048
MAX_POSITIONS = 2048
_ASSISTANT = f"{TURN_START}assistant\n"


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one chat, and for each whether it is the assistant's own and to be learnt."""

    ids: tuple[int, ...]
    is_learnt: tuple[bool, ...]


def train_tokenizer(seed: int, num_conversations: int = 12000) -> PreTrainedTokenizerFast:
    """A tokenizer learnt from so many chats of the corpus; the same seed gives the same tokenizer."""
    from transformers import PreTrainedTokenizerFast

    core = learn(_texts(seed, num_conversations), VOCAB_SIZE - len(CALL_TOKENS), SPECIAL_TOKENS)
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in CALL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=TURN_END, pad_token=TEXT_END, model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def _texts(seed: int, num_conversations: int) -> Iterator[str]:
    """What is said in the chats, and what their tools look like, without the marks around it."""
    for conversation in generate(seed, num_conversations):
        for message in (*conversation.tools, *conversation.messages):
            yield message.get("content") or str(message.get("tool_calls", message)).replace("'", '"')


def encode(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> Example:
    """The chat as its template renders it; learnt is each assistant's message with the mark that ends it."""
    text = tokenizer.apply_chat_template(
        list(conversation.messages), tools=list(conversation.tools) or None, tokenize=False
    )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans, start = [], text.find(_ASSISTANT)
    while start >= 0:
        begin = start + len(_ASSISTANT)
        end = text.index(TURN_END, begin) + len(TURN_END)
        spans.append((begin, end))
        start = text.find(_ASSISTANT, end)
    learnt = tuple(any(begin <= a and b <= end for begin, end in spans) for a, b in encoding["offset_mapping"])
    return Example(tuple(encoding["input_ids"]), learnt)
