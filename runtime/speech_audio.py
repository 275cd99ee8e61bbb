"""What the transcriber needs of sound, and the windows it cuts recordings into.

Knows nothing of file formats or spectrograms itself; that is audio/.
Called by the transcriber, always on a worker thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from runtime.transcription import VadChunking

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """Samples [start_sample, end_sample) of a recording, at most as many as the model hears at once."""

    start_sample: int
    end_sample: int


class SpeechAudio(Protocol):
    """Sound as numbers."""

    def decode(self, data: bytes) -> Samples:
        """Mono samples at 16 kHz of an uploaded file.

        Raises:
            CallerError: it is no audio that can be read, or too much of it.
        """

    def windows(self, samples: Samples, chunking: VadChunking) -> list[Window]:
        """Where something is spoken, in order and without overlap; none for silence."""

    def features(self, samples: Samples) -> npt.NDArray[np.float32]:
        """The spectrogram of one window, float32 [mel bins, frames], silence after its end."""

    def token_times(
        self, alignment: npt.NDArray[np.float32], *, first_row: int, num_tokens: int, num_positions: int
    ) -> list[float]:
        """When each token begins, and when the last ends, in seconds from the window's beginning; never falling.

        Args:
            alignment: float32 [heads, rows, encoder positions], a row for each token of a prompt.
            first_row: from which the first of the tokens was written; the others follow, and the row after them is
                the one that ended the text.
            num_tokens: at least 1.
            num_positions: those that hold sound, from the first on.
        """
