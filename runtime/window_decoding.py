"""Writes down one window: the tries it takes, and which of them stands.

Knows nothing of other windows, of waveforms or of times.
Called by the transcriber, for many windows at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.sequence import PromptProbe, SamplingParams, Source
from runtime.fallback import (
    MAX_NO_SPEECH_PROB,
    Confidence,
    Verdict,
    compression_ratio,
    mean,
    seed_of_try,
    temperatures,
)
from runtime.request_sequences import RequestSequences
from runtime.speech_model import SpeechModel
from runtime.whisper_prompts import Manner, language_rules, window_prompt, window_rules

if TYPE_CHECKING:
    from text.speech import SpeechText


@dataclass(frozen=True, slots=True)
class DecodedWindow:
    """What was written of one window.

    Args:
        token_ids: of the try that stands, timestamps included, without the one that ended it; none for silence.
        temperature: of that try.
        confidence: in that try.
        num_tokens: chosen in all tries.
        num_fallbacks: tries after the first.
        submitted_time_s: since when the window has been in the queue.
    """

    token_ids: tuple[int, ...]
    temperature: float
    confidence: Confidence
    num_tokens: int
    num_fallbacks: int
    submitted_time_s: float


@dataclass(frozen=True, slots=True)
class WindowDecoder:
    """Decodes the windows of one recording.

    Args:
        model: its tokens.
        text: its vocabulary.
        sequences: of the request.
        manner: how to write.
        temperature: 0 for the ladder.
        seed: of the request.
    """

    model: SpeechModel
    text: SpeechText
    sequences: RequestSequences
    manner: Manner
    temperature: float
    seed: int

    async def decode(self, source: Source, number: int) -> DecodedWindow:
        """Tries one temperature after the other until the result is good; the last stands as it is.

        Args:
            source: the window's spectrogram.
            number: of the window in its recording.
        Raises:
            ServerError: whatever a sequence failed with.
        """
        submitted_time_s = time.monotonic()
        no_speech_prob: float | None = None
        num_tokens = 0
        ladder = temperatures(self.temperature)
        for rung, temperature in enumerate(ladder):
            params = self._params(temperature, seed_of_try(self.seed, number, rung), probes=no_speech_prob is None)
            result = await self.sequences.run(
                window_prompt(self.model, self.manner)[0], params, source, submitted_time_s=submitted_time_s
            )
            num_tokens += len(result.logprobs)
            if no_speech_prob is None:
                no_speech_prob = _probability(result.probed)
            confidence = Confidence(
                mean(result.logprobs), compression_ratio(self.text.decode(result.token_ids)), no_speech_prob
            )
            verdict: Verdict = confidence.verdict
            if verdict != "doubtful" or rung + 1 == len(ladder):
                break
        token_ids = () if verdict == "silent" else result.token_ids
        return DecodedWindow(token_ids, temperature, confidence, num_tokens, rung, submitted_time_s)

    def _params(self, temperature: float, seed: int, *, probes: bool) -> SamplingParams:
        prompt, start_position = window_prompt(self.model, self.manner)
        return SamplingParams(
            max_tokens=self.model.max_target_positions - len(prompt),
            temperature=temperature,
            seed=seed,
            num_logprobs=0,
            token_rules=window_rules(self.model, self.manner),
            probe=PromptProbe(start_position, (self.model.no_speech_id,)) if probes else None,
        )


@dataclass(frozen=True, slots=True)
class HeardLanguage:
    """The likeliest language of a window, and how likely it holds no speech at all."""

    language: str
    no_speech_prob: float

    @property
    def is_speech(self) -> bool:
        """Whether the window is worth believing."""
        return self.no_speech_prob <= MAX_NO_SPEECH_PROB


async def hear_language(model: SpeechModel, sequences: RequestSequences, source: Source) -> HeardLanguage:
    """Which language token the model would begin with; one token is made for it, and the encoder's output is kept."""
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        token_rules=language_rules(model),
        probe=PromptProbe(0, (model.no_speech_id,)),
    )
    result = await sequences.run([model.start_id], params, source)
    codes = {token_id: code for code, token_id in model.language_ids.items()}
    return HeardLanguage(codes[result.token_ids[0]], _probability(result.probed))


def _probability(probed: Sequence[float] | None) -> float:
    if not probed:
        raise RuntimeError("the engine did not answer the probe")
    return probed[0]
