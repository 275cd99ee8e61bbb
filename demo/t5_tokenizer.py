"""The demo T5's tokenizer: byte-level BPE learnt from its tasks, single digits, T5's special tokens at T5's places.

Knows nothing of the model or of how it is trained.
Called by train_t5.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenizers import processors

from demo.byte_level_bpe import learn
from demo.corpus.text_tasks import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN_TOKEN = "<pad>", "</s>", "<unk>"
VOCAB_SIZE = 1024
MAX_LENGTH = 512


def train_tokenizer(seed: int, num_exchanges: int = 30000) -> PreTrainedTokenizerFast:
    """A tokenizer learnt from so many exchanges of the corpus; it ends every text with `</s>`, as T5's does."""
    from transformers import PreTrainedTokenizerFast

    core = learn(_texts(seed, num_exchanges), VOCAB_SIZE, (PAD, END, UNKNOWN_TOKEN))
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, core.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN_TOKEN, model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _texts(seed: int, num_exchanges: int) -> Iterator[str]:
    for exchange in generate(seed, num_exchanges):
        yield exchange.prompt
        yield exchange.answer
