"""The choices of one prompt by beam search: known only at its end, and then whole.

Knows nothing of how beams are compared.
Called by api/generation.py, for choices that have beams.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from collections.abc import Sequence as Series
from typing import TYPE_CHECKING

from engine.sequence import SequenceOutput
from model_manager import ModelManager
from runtime.beam_search import BeamResult
from runtime.beams import BeamParams, Hypothesis

if TYPE_CHECKING:
    from api.generation import Choice, ChoiceDelta


async def beam_deltas(
    manager: ModelManager, choices: Series[Choice], params: BeamParams
) -> AsyncGenerator[ChoiceDelta, None]:
    """One delta for each of a prompt's choices, the best first; closing the generator ends the search."""
    result = await manager.search(choices[0].request, params)
    for choice, hypothesis in zip(choices, result.hypotheses, strict=True):
        yield choice.advance(_output(result, hypothesis))


def _output(result: BeamResult, hypothesis: Hypothesis) -> SequenceOutput:
    """A hypothesis as if one sequence had made it in one step."""
    return SequenceOutput(
        sequence_id=0,
        token_ids=hypothesis.token_ids,
        finish_reason="length" if hypothesis.end_token_id is None else "stop",
        stop_token_id=hypothesis.end_token_id,
        num_cached_tokens=result.num_cached_tokens,
        scheduled_time_s=result.scheduled_time_s,
    )
