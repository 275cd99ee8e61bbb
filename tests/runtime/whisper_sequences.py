"""Runs a transcriber's sequences on a Whisper model of transformers, one at a time and without caches.

Knows nothing of engines: rules are obeyed by the logits processors of transformers, so that what the transcriber asks
for can be compared with what generate() does.
Used by the tests of the transcriber.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperForConditionalGeneration,
    WhisperTimeStampLogitsProcessor,
)

from engine.sequence import SequenceOutput, TokenLogprobs, TokenRules
from runtime.generation import GenerationRequest


@dataclass
class WhisperSequences:
    """See the module; greedy only."""

    model: WhisperForConditionalGeneration
    requests: list[GenerationRequest] = field(default_factory=list)
    num_encoded: int = 0
    _encoded: dict[bytes, Any] = field(default_factory=dict)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceOutput, None]:
        self.requests.append(request)
        params, ids = request.params, list(request.prompt_token_ids)
        assert params.temperature == 0 and request.source is not None
        begin, probed = len(ids), None
        logits = self._logits(request, ids)
        if params.probe is not None:
            probabilities = logits[params.probe.position].softmax(-1)
            probed = tuple(float(probabilities[token_id]) for token_id in params.probe.token_ids)
        while True:
            scores = self._obey(params.token_rules, ids, begin, logits[-1])
            token = int(scores.argmax())
            logprob = float(scores.log_softmax(-1)[token])
            ids.append(token)
            is_end = token == self.model.generation_config.eos_token_id
            is_full = len(ids) - begin == params.max_tokens
            yield SequenceOutput(
                0,
                (token,),
                logprobs=(TokenLogprobs(logprob),) if params.num_logprobs is not None else None,
                finish_reason="stop" if is_end else "length" if is_full else None,
                stop_token_id=token if is_end else None,
                probed=probed if len(ids) == begin + 1 else None,
            )
            if is_end or is_full:
                return
            logits = self._logits(request, ids)

    @torch.inference_mode()
    def _logits(self, request: GenerationRequest, ids: list[int]) -> torch.Tensor:
        source = request.source
        assert source is not None and source.features is not None and source.features.dtype == np.float32
        if source.key not in self._encoded:
            self.num_encoded += 1
            self._encoded[source.key] = self.model.model.encoder(torch.from_numpy(source.features)[None])
        output = self.model(encoder_outputs=self._encoded[source.key], decoder_input_ids=torch.tensor([ids]))
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _obey(self, rules: TokenRules | None, ids: list[int], begin: int, scores: torch.Tensor) -> torch.Tensor:
        scores, input_ids = scores[None], torch.tensor([ids])
        if rules is None:
            return scores[0]
        if rules.allowed is not None:
            allowed = torch.full_like(scores, -torch.inf)
            allowed[:, list(rules.allowed)] = 0
            scores = scores + allowed
        processors: list[Any] = []
        if rules.suppressed_first:
            processors.append(SuppressTokensAtBeginLogitsProcessor(list(rules.suppressed_first), begin))
        if rules.suppressed:
            processors.append(SuppressTokensLogitsProcessor(list(rules.suppressed)))
        if rules.timestamps is not None:
            config = GenerationConfig(eos_token_id=rules.timestamps.end_of_text_id)
            config.no_timestamps_token_id = rules.timestamps.no_timestamps_id
            config.max_initial_timestamp_index = rules.timestamps.max_initial_index
            processors.append(WhisperTimeStampLogitsProcessor(config, begin))
        for processor in processors:
            scores = processor(input_ids, scores)
        return scores[0]
