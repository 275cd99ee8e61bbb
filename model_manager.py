"""The bridge between requests on the event loop and the engine on its thread: admission, generation, shutdown.

Knows nothing of HTTP, wire models or tensors.
Made by app.py, called by api/.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from collections.abc import Sequence as Series
from typing import TYPE_CHECKING, Any, Literal

from config import Settings
from engine.errors import EngineDead, NotServing, RequestTimeout, ServerError, UnsupportedParameter
from engine.sequence import EngineStats, Sequence, SequenceOutput, TokenGrammar
from runtime.admission import Admission
from runtime.beam_search import BeamResult, beam_search
from runtime.beams import BeamParams
from runtime.engine_thread import IDLE_AFTER_S, EngineThread, StepEngine
from runtime.generation import GenerationRequest
from runtime.grammars import Grammars
from runtime.model_loading import LoadedStack, ModelInfo, Progress, load_model_stack
from runtime.output_queue import OutputQueue
from runtime.transcription import TranscriptionEvent, TranscriptionRequest

if TYPE_CHECKING:
    from runtime.transcriber import Transcriber
    from text.grammar import GrammarSpec
    from text.prompt import PromptEncoder

__all__ = ["GenerationRequest", "LoadedStack", "ModelInfo", "ModelManager", "Progress", "load_model_stack"]

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "dead"]

# A step is bounded by --max-batch-tokens: tens of seconds mean a hung driver or a machine that swaps.
STALLED_AFTER_S = 60.0
# Time for requests that were cut off at --shutdown-timeout to send their error frames.
FAREWELL_S = 2.0
# Time for the step that runs to end when the server closes.
CLOSE_S = 5.0


class ModelManager:
    """Owns the engine thread and everyone who waits for it; all methods belong to the event loop that called start.

    Args:
        settings: the options.
        load: builds the stack; called on the engine thread with settings and a place for news of progress.
        idle_after_s: see EngineThread.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[Settings, Progress], LoadedStack] = load_model_stack,
        *,
        idle_after_s: float = IDLE_AFTER_S,
    ) -> None:
        self._settings = settings
        self._load = load
        self._state: State = "loading"
        self._stats = EngineStats()
        self._stack: LoadedStack | None = None
        self._transcriber: Transcriber | None = None
        self._grammars: Grammars | None = None
        self._thread = EngineThread(
            self._open_engine,
            self,
            microsleep_s=settings.continuous_batching_microsleep,
            idle_after_s=idle_after_s,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loaded: asyncio.Future[ModelInfo] | None = None
        self._queues: dict[int, OutputQueue] = {}
        self._ids = itertools.count()
        self._admission = Admission(settings.max_concurrent)
        self._refusal: ServerError | None = None  # why no sequence may start any more

    # What is known of the model and the engine.

    @property
    def state(self) -> State:
        """Where the server stands."""
        return self._state

    @property
    def is_stalled(self) -> bool:
        """Whether one step has been running for longer than any step should; loading is never a stall."""
        return self._thread.seconds_in_step() > STALLED_AFTER_S

    @property
    def has_ended(self) -> bool:
        """Whether the engine thread has ended, or never began."""
        return self._thread.join(0.0)

    @property
    def stats(self) -> EngineStats:
        """The engine's counters after its latest step."""
        return self._stats

    @property
    def num_admitted(self) -> int:
        """Requests in the server."""
        return self._admission.num_inside

    @property
    def num_audio_windows(self) -> int:
        """Windows of all recordings that are being written down."""
        return 0 if self._transcriber is None else self._transcriber.num_windows_in_flight

    @property
    def info(self) -> ModelInfo:
        """What was loaded; raises NotServing before it is."""
        return self._loaded_stack().info

    @property
    def prompts(self) -> PromptEncoder:
        """Turns messages and text into ids; raises NotServing before the model is loaded."""
        return self._loaded_stack().prompts

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers; raises NotServing before the model is loaded."""
        return self._loaded_stack().tokenizer

    @property
    def transcriber(self) -> Transcriber:
        """Turns speech into text.

        Raises:
            NotServing: before the model is loaded.
            UnsupportedParameter: the model is no speech model.
        """
        stack = self._loaded_stack()
        if self._transcriber is None:
            raise UnsupportedParameter(f"{stack.info.name} is no speech model: it cannot transcribe", param="model")
        return self._transcriber

    def _loaded_stack(self) -> LoadedStack:
        if self._stack is None:
            raise NotServing("the model is still loading", retry_after_s=5.0)
        return self._stack

    # Life and death.

    async def start(self) -> None:
        """Begins to load in the background and returns at once; state goes from loading to ready or dead."""
        self._loop = asyncio.get_running_loop()
        self._loaded = self._loop.create_future()
        # The exception is for whoever asks wait_until_loaded; nobody asking is no error.
        self._loaded.add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())
        self._thread.start()

    def profile_again(self) -> None:
        """Profiles a few more steps, where --torch-profiling is on and the model is loaded."""
        if self._stack is not None:
            self._stack.engine.profile_again()

    async def wait_until_loaded(self) -> ModelInfo:
        """What was loaded, as soon as it is; raises what loading raised, StartupError among others."""
        if self._loaded is None:
            raise NotServing("the model is not being loaded")
        return await asyncio.shield(self._loaded)

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests and lets those in the server finish; cuts off who has not at the timeout."""
        if self._state != "dead":
            self._state = "draining"
        if await self._admission.wait_until_empty(timeout_s):
            return
        logger.warning("shutdown: %d requests are cut off after %g s", self.num_admitted, timeout_s)
        self._fail_all(NotServing("the server shut down before the request was finished"))
        await self._admission.wait_until_empty(FAREWELL_S)

    async def close(self) -> None:
        """Ends the engine thread after the step that runs, and answers whoever is left."""
        if self._state != "dead":
            self._state = "draining"
        self._fail_all(NotServing("the server has shut down"))
        self._thread.stop()
        if self._transcriber is not None:
            self._transcriber.close()
        if self._grammars is not None:
            self._grammars.close()
        if self._loaded is None or self._loaded.done():  # loading cannot be interrupted: no use waiting for it
            await asyncio.to_thread(self._thread.join, CLOSE_S)

    def _fail_all(self, error: ServerError) -> None:
        if self._refusal is None:
            self._refusal = error
        for queue in self._queues.values():
            queue.fail(error)

    # Requests.

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """Counts a request as in the server, from before its prompt is looked at until its last byte is made.

        Raises:
            QueueFull: --max-concurrent requests are in the server.
            NotServing: loading or draining.
            EngineDead: the engine has ended.
        """
        self._check_open()
        with self._admission.place():
            yield

    def _check_open(self) -> None:
        if self._state == "dead":
            raise EngineDead("the engine has stopped; the server must be restarted")
        if self._state == "draining":
            raise NotServing("the server is shutting down")
        self._loaded_stack()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceOutput, None]:
        """Runs one sequence and yields what its steps make; closing the iterator frees everything at once.

        Yields:
            Outputs without error; the last has a finish_reason. Several steps arrive as one when the caller is slow.
        Raises:
            CallerError: the sequence can never fit.
            OperatorError: it waited or ran too long, or the server shuts down.
            InternalError: its step failed, or the engine died.
        """
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)  # else every raise would lengthen its traceback
        self._loaded_stack()
        arrival_s = request.arrival_time_s
        sequence = Sequence(
            next(self._ids),
            request.prompt_token_ids,
            request.params,
            arrival_s if request.submitted_time_s is None else request.submitted_time_s,
            priority=request.priority,
            cache_salt=request.cache_salt,
            deadline_s=self._queue_deadline_s(request),
            source=request.source,
        )
        queue = self._queues[sequence.sequence_id] = OutputQueue()
        is_over = False
        try:
            self._thread.add(sequence)
            with self._time_limit(queue, arrival_s):
                while not is_over:
                    output = await queue.get()
                    is_over = output.is_last
                    yield output
        finally:
            del self._queues[sequence.sequence_id]
            if not is_over:
                self._thread.abort(sequence.sequence_id)

    async def search(self, request: GenerationRequest, params: BeamParams) -> BeamResult:
        """Searches with beams, see runtime/beam_search.py; cancelling it frees everything at once."""
        return await beam_search(self.generate, request, params, self.info.eos_token_ids)

    async def grammar(self, spec: GrammarSpec, prompt_token_ids: Series[int]) -> TokenGrammar:
        """The grammar of what the model generates after a prompt; raises GrammarError when it cannot be used."""
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.info.vocab_size, self.info.eos_token_ids)
        return await self._grammars.get(spec, prompt_token_ids)

    def transcribe(self, request: TranscriptionRequest) -> AsyncGenerator[TranscriptionEvent, None]:
        """Turns a recording into text, see Transcriber.transcribe; closing the iterator frees everything at once.

        Raises:
            NotServing, UnsupportedParameter: see transcriber; the rest comes from the iterator.
        """
        return self.transcriber.transcribe(request)

    def _queue_deadline_s(self, request: GenerationRequest) -> float | None:
        limit_s = self._settings.max_queue_time
        if limit_s is None or request.submitted_time_s is not None:
            return None
        return request.arrival_time_s + limit_s

    @contextlib.contextmanager
    def _time_limit(self, queue: OutputQueue, arrival_s: float) -> Iterator[None]:
        """Fails the queue when --request-timeout has passed; one timer a sequence costs nothing per token."""
        limit_s = self._settings.request_timeout
        if limit_s is None:
            yield
            return
        error = RequestTimeout(f"the request ran for longer than --request-timeout {limit_s:g} s")
        remaining_s = arrival_s + limit_s - time.monotonic()
        timer = asyncio.get_running_loop().call_later(remaining_s, queue.fail, error)
        try:
            yield
        finally:
            timer.cancel()

    # News from the engine thread, and their arrival on the event loop.

    def _open_engine(self) -> StepEngine:
        """On the engine thread: loads."""
        stack = self._load(self._settings, self._report)
        self._post(self._on_loaded, stack)
        return stack.engine

    def _report(self, doing: str, share: float | None) -> None:
        """On the engine thread: news of loading, one line each."""
        logger.info("%s%s", doing, "" if share is None else f" ({share:.0%})")

    def on_outputs(self, outputs: Series[SequenceOutput], stats: EngineStats) -> None:
        """On the engine thread: one wake-up of the event loop for all rows of a step."""
        self._post(self._deliver, outputs, stats)

    def on_death(self, error: BaseException) -> None:
        """On the engine thread: its last word."""
        self._post(self._bury, error)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None  # set before the thread starts
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends and nobody listens
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _on_loaded(self, stack: LoadedStack) -> None:
        self._stack = stack
        if stack.make_transcriber is not None:
            self._transcriber = stack.make_transcriber(self.generate)
        if self._state == "loading":
            self._state = "ready"
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(stack.info)

    def _deliver(self, outputs: Series[SequenceOutput], stats: EngineStats) -> None:
        self._stats = stats
        for output in outputs:
            queue = self._queues.get(output.sequence_id)
            if queue is not None:  # None: its request has gone and the abort is on its way
                queue.put(output)

    def _bury(self, error: BaseException) -> None:
        self._state = "dead"
        self._fail_all(EngineDead("the engine has stopped; the server must be restarted"))
        if self._loaded is not None and not self._loaded.done():
            # A library that calls sys.exit() while loading must not end the event loop from within.
            self._loaded.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        else:
            logger.critical("the engine died", exc_info=error)
