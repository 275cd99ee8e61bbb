"""The one tree of errors of this server, split by who must act.

Knows nothing of HTTP bodies; each class carries the facts an answer needs (field, code, when to retry).
Raised by text, engine and model_manager; turned into responses by api/errors.py.

    ServerError
    ├── CallerError                 4xx: the request must change
    │   ├── InvalidValue            400: a field has a value the rule forbids
    │   ├── UnsupportedParameter    400: a field that this server or model cannot honour
    │   └── ContextLengthExceeded   400: prompt and output can never fit
    ├── OperatorError               429/503: the same request may work later or elsewhere
    │   ├── QueueFull               429: --max-concurrent reached
    │   ├── QueueTimeout            503: waited longer than --max-queue-time
    │   ├── RequestTimeout          503: ran longer than --request-timeout
    │   └── NotServing              503: loading, draining or shut down
    └── InternalError               500: we must act
        ├── NonFiniteLogits         the model gave NaN or only -inf for this row
        ├── StepFailed              the step that held this sequence raised
        └── EngineDead              the engine thread ended
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of every error this server raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CallerError(ServerError):
    """The request itself must change; `param` is the wire field at fault, if one is."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidValue(CallerError):
    """A field holds a value that its rule forbids."""


class UnsupportedParameter(CallerError):
    """A field that this server, or the model it runs, cannot honour."""


class ContextLengthExceeded(CallerError):
    """Prompt plus requested output can never fit; the message holds both numbers."""


class OperatorError(ServerError):
    """Nothing is wrong with the request; `retry_after_s` says when to try again (None: unknown)."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(OperatorError):
    """As many requests as --max-concurrent allows are in the server."""


class QueueTimeout(OperatorError):
    """The request waited in the queue for longer than --max-queue-time."""


class RequestTimeout(OperatorError):
    """The request ran for longer than --request-timeout."""


class NotServing(OperatorError):
    """The server is loading, draining or shut down."""


class InternalError(ServerError):
    """A fault of the server; a retry of the same request would likely fail again."""


class NonFiniteLogits(InternalError):
    """The model's logits for this row held no finite value to choose from, or a NaN."""


class StepFailed(InternalError):
    """The engine step that held this sequence raised; the server lives on."""


class EngineDead(InternalError):
    """The engine thread has ended; nothing can be served until a restart."""
