"""What can be wrong with text: a prompt that cannot be made into tokens, a grammar, or a tokenizer that cannot be had.

Knows nothing of HTTP or of the engine's errors; PromptError and GrammarError are the caller's to mend, a TokenizerError
the operator's.
Raised throughout text/; turned into answers by api/ and into a refused start by model_manager.

    ValueError
    ├── PromptError        400: the messages or the text of a request
    │   └── PromptTooLong  400: more text than the model's context can hold, known before tokenising
    ├── GrammarError       400: what a request wants its output to be like
    └── TokenizerError     exit 2: the options that name the tokenizer, or the files of the model
"""

from __future__ import annotations


class PromptError(ValueError):
    """The prompt must change; `param` is the wire field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class PromptTooLong(PromptError):
    """The text makes at least `min_num_tokens` tokens, more than the context holds."""

    def __init__(self, message: str, param: str | None, *, min_num_tokens: int) -> None:
        super().__init__(message, param)
        self.min_num_tokens = min_num_tokens


class GrammarError(ValueError):
    """The grammar is no grammar, asks for what cannot be kept to, or is too large to be used."""


class TokenizerError(ValueError):
    """The tokenizer that the options name does not exist, cannot be loaded, or is not what they ask for."""
