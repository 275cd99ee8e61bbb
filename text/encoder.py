"""Makes token ids of text in which some control tokens are meant as tokens and others as their letters.

Knows nothing of messages or templates; it is handed text and the marks that stand for what users wrote.
Called by prompt.py; safe to call from several threads at once.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Encoding, Tokenizer

from text.controls import ControlTokens, Marks, any_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_BREAK_ROUNDS = 4


class TextEncoder:
    """Token ids of text.

    Args:
        tokenizer: of any kind. Tokenizers of the Rust library are called directly: the same ids as calling the
            tokenizer, without its per-call settings, which threads would share.
        controls: the strings that are tokens only where the template wrote them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: ControlTokens) -> None:
        self._tokenizer = tokenizer
        self._controls = controls
        self._backend: Tokenizer | None = tokenizer.backend_tokenizer if _is_plain_fast(tokenizer) else None
        if self._backend is not None:
            # A tokenizer.json may ask for these; transformers ignores them unless a call asks for them too.
            self._backend.no_truncation()
            self._backend.no_padding()
        self._aliases = _AliasTokenizer.make(self._backend, controls) if self._backend is not None else None
        unknown_id = tokenizer.unk_token_id
        ids = {tokenizer.convert_tokens_to_ids(string) for string in controls.all}
        self._control_ids = frozenset(ids - {unknown_id, None})
        self._unknown_token = tokenizer.unk_token if unknown_id is not None else None
        self._prefix, self._suffix = self._find_affixes()

    def encode_rendered(self, text: str, marks: Marks) -> list[int]:
        """Ids of a rendered template: control tokens in it are the template's, those behind marks are text."""
        if not marks:
            ids = self._encode(text)
            num_meant = self._controls.count(text) - (text.count(self._unknown_token) if self._unknown_token else 0)
            if self._count_controls(ids) <= max(num_meant, 0):
                return ids
        return self._encode_mixed(text, marks)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, with what the tokenizer puts around a text (BOS); no control token is meant in it."""
        return [*self._prefix, *self.encode_bare(text), *self._suffix]

    def encode_bare(self, text: str) -> list[int]:
        """Ids of plain text alone; no control token is meant in it."""
        if not self._controls.count(text):
            ids = self._encode(text)
            if not self._count_controls(ids):
                return ids
        marks = Marks(self._controls)
        return self._encode_mixed(marks.take(text), marks)

    def _encode(self, text: str) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _count_controls(self, ids: list[int]) -> int:
        control_ids = self._control_ids
        return sum(1 for token_id in ids if token_id in control_ids)

    def _encode_mixed(self, text: str, marks: Marks) -> list[int]:
        if self._aliases is not None:
            return self._aliases.encode(text, marks, self._control_ids)
        return self._encode_in_pieces(text, marks)

    def _find_affixes(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare = self._encode("a")
        whole = list(self._tokenizer.encode("a"))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def _encode_in_pieces(self, text: str, marks: Marks) -> list[int]:
        """For tokenizers in Python: what lies between two of the template's control tokens is encoded by itself."""
        ids: list[int] = []
        usual = ""  # whatever holds nothing of users' to be taken literally, gathered: exactly the usual tokenisation
        for segment, is_literal in _segments(text, marks, self._controls):
            if not is_literal:
                usual += segment
                continue
            ids += self._encode(usual) if usual else []
            usual = ""
            ids += self._encode_as_letters(segment)
        return ids + (self._encode(usual) if usual else [])

    def _encode_as_letters(self, text: str) -> list[int]:
        ids = list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if not self._count_controls(ids):
            return ids
        # This vocabulary makes a control token out of its letters: cut each such string in the middle.
        ids, rest = [], ""
        for index, piece in enumerate(self._controls.split(text)):
            if index % 2 and len(piece) > 1:
                ids += self._tokenizer.encode(
                    rest + piece[: len(piece) // 2], add_special_tokens=False, split_special_tokens=True
                )
                rest = piece[len(piece) // 2 :]
            else:
                rest += piece
        return ids + list(self._tokenizer.encode(rest, add_special_tokens=False, split_special_tokens=True))


def _segments(text: str, marks: Marks, controls: ControlTokens) -> Iterator[tuple[str, bool]]:
    """A rendered text cut at its control tokens, marks resolved; and whether a segment held marks."""
    segment, is_literal = "", False
    for index, part in enumerate(marks.split(text)):
        if index % 2:
            segment, is_literal = segment + part, True
            continue
        for position, piece in enumerate(controls.split(part)):
            if position % 2:
                yield segment, is_literal
                yield piece, False
                segment, is_literal = "", False
            else:
                segment += piece
    yield segment, is_literal


class _AliasTokenizer:
    """A second tokenizer over the same vocabulary, to which control tokens are known by secret names only.

    The template's control tokens are renamed in the text; what users wrote is then text by itself, and all else
    (pre-tokenisation beside a control token, prefix spaces, normalisation) is as ever. It shares the model of the
    first, so it costs no memory.
    """

    def __init__(self, tokenizer: Tokenizer, names: dict[str, str], ids: dict[int, int | None], breaker: str) -> None:
        self._tokenizer = tokenizer
        self._names = names
        self._pattern = any_of(names)
        self._strings = {name: string for string, name in names.items()}
        self._name_pattern = any_of(self._strings)
        self._name_ids = frozenset(map(tokenizer.token_to_id, self._strings))
        self._ids = ids
        self._breaker = breaker

    @classmethod
    def make(cls, backend: Tokenizer, controls: ControlTokens) -> _AliasTokenizer | None:
        """None where new names would collide with ids of the vocabulary (one with holes)."""
        nonce = secrets.token_hex(12)
        breaker = f"b{nonce}b"
        tokenizer = Tokenizer(backend.model)
        if backend.normalizer is not None:
            tokenizer.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            tokenizer.pre_tokenizer = backend.pre_tokenizer
        names: dict[str, str] = {}
        ids: dict[int, int | None] = {}
        added: list[tuple[int | None, AddedToken]] = [(None, AddedToken(breaker, normalized=False))]
        for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
            name = token.content
            if name in controls.all:
                name = names[token.content] = f"a{nonce}x{token_id}a"
            added.append((token_id, _renamed(token, name)))
        tokenizer.add_tokens([token for _, token in added])
        for meant_id, token in added:
            new_id = tokenizer.token_to_id(token.content)
            is_known = backend.model.token_to_id(token.content) is not None
            if new_id is None or (not is_known and backend.model.id_to_token(new_id) is not None):
                return None
            ids[new_id] = meant_id
        return cls(tokenizer, names, ids, breaker)

    def encode(self, text: str, marks: Marks, control_ids: frozenset[int]) -> list[int]:
        """Ids of a rendered text, without what stands around a text."""
        parts = marks.split(text)
        parts[::2] = [self._pattern.sub(lambda found: self._names[found[0]], part) for part in parts[::2]]
        text = "".join(parts)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        restored = self._restore_letters(text, encoding)
        if restored != text:
            text, encoding = restored, self._tokenizer.encode(restored, add_special_tokens=False)
        for _ in range(_MAX_BREAK_ROUNDS):
            # Some vocabularies make a control token out of its letters; a piece boundary within them prevents it.
            made = [
                span
                for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)
                if token_id in control_ids and token_id not in self._ids and span[1] - span[0] > 1
            ]
            if not made:
                break
            for span in reversed(made):
                middle = sum(span) // 2
                text = text[:middle] + self._breaker + text[middle:]
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        meant = (self._ids.get(token_id, token_id) for token_id in encoding.ids)
        return [token_id for token_id in meant if token_id is not None]

    def _restore_letters(self, text: str, encoding: Encoding) -> str:
        """Give the template's control tokens their letters back where the tokenizer does not take them as tokens.

        Llama 2's old kind takes one only where a text or a word begins: right after another it is its letters.
        """
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        taken = [span for token_id, span in spans if token_id in self._name_ids]
        if len(taken) == sum(1 for _ in self._name_pattern.finditer(text)):
            return text

        def restored(found: re.Match[str]) -> str:
            is_token = any(first < found.end() and found.start() < last for first, last in taken)
            return found[0] if is_token else self._strings[found[0]]

        return self._name_pattern.sub(restored, text)


def _renamed(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )


def _is_plain_fast(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding is the Rust library's alone: a few classes do work of their own around it."""
    if not tokenizer.is_fast:
        return False
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    return all(getattr(kind, name) is getattr(TokenizersBackend, name) for name in ("encode", "_encode_plus"))
