"""Small tokenizers of every kind that matters, built on the spot.

Knows nothing of what is tested with them.
Used by the tests of text/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, PythonBackend

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Hello world! How are you today? I am fine, thank you.",
    "user assistant system tool: a list of words, one two three",
    "Grüße aus Köln. 你好，世界。 emoji 😀 and family 👨‍👩‍👧.",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set start = 1 %}{% else %}{% set start = 0 %}{% endif %}"
    "{% for m in messages[start:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BERT = "{{ cls_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ sep_token }}{% endfor %}"


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """GPT-2's and Qwen's kind: byte-level BPE with ChatML, and an added token of spaces that is ordinary text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>", "    ")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )


def sentencepiece(
    template: str | None = LLAMA2, prepend_scheme: str = "first", *, is_legacy: bool = False
) -> PreTrainedTokenizerFast:
    """Llama's kind: BPE over pieces with a mark for spaces, bytes for the rest; `is_legacy` as Llama 2 was."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=200))
    vocab = {piece: index for index, piece in enumerate(special)}
    vocab |= {f"<0x{byte:02X}>": len(special) + byte for byte in range(256)}
    for piece in sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__):
        vocab[piece] = len(vocab)
    merges = [tuple(pair) for pair in _merges(trained)]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if is_legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, normalized=is_legacy) for text in special])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    # The base class itself: it takes the backend as it is.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def _merges(tokenizer: Tokenizer) -> list[Any]:
    import json

    return list(json.loads(tokenizer.to_str())["model"]["merges"])


def unigram(template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """T5's kind: its model makes `</s>` out of the letters, and its normaliser makes letters of full-width ones."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator([*CORPUS[:3], "<s> a < b / c > d </s>[INST] [/INST]"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def wordpiece(template: str | None = BERT) -> PreTrainedTokenizerFast:
    """BERT's kind: lower-case words and pieces of words, an unknown token for the rest."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.train_from_iterator(CORPUS[:3], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    pair = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=pair)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        chat_template=template,
    )


def byt5(template: str | None = CHATML) -> Any:
    """A tokenizer in Python that transformers has: bytes, and special tokens before them."""
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = template
    return tokenizer


class WordTokenizer(PythonBackend):  # type: ignore[misc]  # transformers is not typed
    """A tokenizer in Python whose vocabulary holds its special tokens as words: it makes them out of plain text."""

    def __init__(self, **kwargs: Any) -> None:
        words = sorted({word for line in CORPUS for word in line.split()})
        letters = [chr(code) for code in range(32, 127)]
        self.words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "\n", *letters, *words])}
        self.pieces = {index: word for word, index in self.words.items()}
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.words)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        found = []
        for index, word in enumerate(text.split(" ")):
            found += [" "] if index else []
            found += [word] if word in self.words else list(word)
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.get(index, "<unk>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def words(template: str | None = LLAMA2) -> Any:
    return WordTokenizer(chat_template=template)


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "llama-first": sentencepiece,
    "llama-always": lambda: sentencepiece(prepend_scheme="always"),
    "llama-legacy": lambda: sentencepiece(is_legacy=True),
    "unigram": unigram,
    "wordpiece": wordpiece,
    "byt5": byt5,
    "words": words,
}
