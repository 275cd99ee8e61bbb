"""Trains the demo speech model from a seed: corpus, tokenizer, weights, all that a checkpoint directory needs.

Knows nothing of the server; `python -m demo.train_whisper --out demo/whisper` is the whole of it.
Called by hand; demo/README.md says what to expect.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

from demo.optimization import Optimizer, Progress, Rates, running_mean
from demo.speech.pool import Habits
from demo.speech.speaking import SpeakerProcess
from demo.speech.voices import TRAINING
from demo.speech.windows import NUM_POSITIONS, Mixture
from demo.whisper_examples import Batch, batches
from demo.whisper_generation import generation_config
from demo.whisper_model import Learner, build_whisper
from demo.whisper_tokenizer import train_tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the result.

    Args:
        num_steps: optimizer steps.
        max_minutes: wall time; where it runs out first the schedule is cut short, and the result is the machine's.
        batch_positions: encoder positions, 0.02 s each, in one step.
        early_share, last_share: how much of training has the early widths, the last ones.
        decay_share: how much of it has a falling learning rate.
        matrix_lr, vector_lr: peak learning rates of Muon (matrices) and AdamW (the rest).
    """

    seed: int = 0
    num_steps: int = 12000
    max_minutes: float = 88.0
    batch_positions: int = 4500
    matrix_lr: float = 0.02
    vector_lr: float = 0.003
    warmup_steps: int = 60
    decay_share: float = 0.5
    early_share: float = 0.2
    last_share: float = 0.35


# What training goes on from: the weights in float32, and those that a finished model no longer has.
_WEIGHTS_FILE = "learner.pt"
Stage = Literal["early", "main", "last"]
_STAGES: tuple[Stage, ...] = ("early", "main", "last")
# (positions, share of the batches): most is learnt from short parts, whose attention costs little; how words are found
# in half a minute, or before half a minute of silence, only from whole windows.
_WIDTHS: dict[Stage, tuple[tuple[int, float], ...]] = {
    "early": ((100, 0.45), (150, 0.35), (250, 0.2)),
    "main": ((100, 0.2), (200, 0.35), (400, 0.25), (NUM_POSITIONS, 0.2)),
    "last": ((150, 0.2), (300, 0.3), (700, 0.1), (NUM_POSITIONS, 0.4)),
}


class _Batches(IterableDataset[Batch]):
    """The batches of a stage, made in a process of their own: eSpeak's library keeps its state to itself."""

    def __init__(self, tokenizer: WhisperTokenizer, recipe: Recipe, stage: Stage) -> None:
        self._tokenizer, self._recipe, self._stage = tokenizer, recipe, stage

    def __iter__(self) -> Iterator[Batch]:
        seed = len(_STAGES) * self._recipe.seed + _STAGES.index(self._stage)
        torch.set_num_threads(1)
        return batches(
            self._tokenizer, SpeakerProcess().speak, Habits(TRAINING), Mixture(), seed,
            _WIDTHS[self._stage], self._recipe.batch_positions,
        )  # fmt: skip


def train(
    recipe: Recipe, checkpoints: Path, start_from: Path | None = None
) -> tuple[WhisperForConditionalGeneration, WhisperTokenizer]:
    """The trained model, in bfloat16, and its tokenizer; a checkpoint is left behind every 100 steps."""
    torch.manual_seed(recipe.seed)
    learner, tokenizer = _learner(recipe, start_from)
    _log.info("parameters: %s", sum(p.numel() for p in learner.whisper.parameters()))
    rates = Rates(
        recipe.num_steps,
        recipe.max_minutes,
        recipe.matrix_lr,
        recipe.vector_lr,
        recipe.warmup_steps,
        recipe.decay_share,
    )
    optimizer = Optimizer(learner, rates, _matrix_scale, max_gradient_norm=2.0)
    averaged = Averaged(optimizer.weights())
    progress, means, stage = Progress(rates), [0.0, 0.0, 0.0], None
    while progress.share < 1:
        if (due := _stage(recipe, progress.share)) != stage:
            stage = due
            made = iter(DataLoader(_Batches(tokenizer, recipe, stage), batch_size=None, num_workers=1))
        losses = learner.losses(_augmented(next(made)))
        losses.total().backward()  # type: ignore[no-untyped-call]
        optimizer.step(progress.rate())
        averaged.add(optimizer.weights())
        progress.advance()
        now = (losses.tokens.item(), losses.classes.item(), losses.guide.item())
        means = [running_mean(mean, new, progress.step) for mean, new in zip(means, now, strict=True)]
        if progress.step % 20 == 0:
            _log.info(
                "step %d  %.1f min  tokens %.4f  classes %.4f  guide %.4f  progress %.3f",
                progress.step,
                progress.minutes,
                *means,
                progress.share,
            )
        if progress.step % 100 == 0:
            save(averaged.finished(tokenizer), tokenizer, checkpoints)
            torch.save(optimizer.weights(), checkpoints / _WEIGHTS_FILE)
    return averaged.finished(tokenizer), tokenizer


def _stage(recipe: Recipe, share: float) -> Stage:
    """Which widths are due when so much of training is done."""
    return "early" if share < recipe.early_share else "main" if share < 1 - recipe.last_share else "last"


def _matrix_scale(name: str, parameter: torch.nn.Parameter) -> float:
    """Muon changes the layers' matrices; convolutions, embeddings and the small maps are AdamW's."""
    return 1.0 if parameter.ndim == 2 and ".layers." in name else 0.0


class Averaged:
    """The mean of the weights of the last hundred steps: better than each while the learning rate is high."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._means = {name: weight.clone() for name, weight in weights.items()}
        self._num_steps = 0

    @torch.no_grad()
    def add(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes the weights of one more step."""
        share = max(0.01, 1 / (1 + self._num_steps / 10))
        for name, mean in self._means.items():
            mean.lerp_(weights[name], share)
        self._num_steps += 1

    def finished(self, tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
        """The model with the mean weights, in bfloat16."""
        learner = Learner(build_whisper(tokenizer))
        learner.load_state_dict(self._means, strict=False)
        return learner.finished().to(torch.bfloat16)


def _learner(recipe: Recipe, start_from: Path | None) -> tuple[Learner, WhisperTokenizer]:
    """An untrained one, or the one that an earlier training left behind."""
    tokenizer = train_tokenizer(recipe.seed) if start_from is None else WhisperTokenizer.from_pretrained(start_from)
    learner = Learner(build_whisper(tokenizer))
    if start_from is not None:
        learner.load_state_dict(torch.load(start_from / _WEIGHTS_FILE, weights_only=True), strict=False)
    return learner, tokenizer


def _augmented(batch: Batch) -> Batch:
    """Bands of pitch and moments of time made flat, in half of the rows: in place."""
    features = batch.features
    for row in features:
        if torch.rand(()) < 0.5:
            for _ in range(2):
                width, at = int(torch.randint(0, 11, ())), int(torch.randint(0, 70, ()))
                row[at : at + width] = row.mean()
            for _ in range(row.shape[1] // 150):
                width, at = int(torch.randint(0, 9, ())), int(torch.randint(0, row.shape[1], ()))
                row[:, at : at + width] = row.mean()
    batch.features.copy_(features)
    return _in_bfloat16(batch)


def _in_bfloat16(batch: Batch) -> Batch:
    return Batch(**{name: value.bfloat16() if name == "features" else value for name, value in _fields(batch)})


def _fields(batch: Batch) -> list[tuple[str, torch.Tensor]]:
    return [(name, getattr(batch, name)) for name in Batch.__dataclass_fields__]


def save(model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, out: Path) -> None:
    """Writes the checkpoint with tokenizer, feature extractor and generation defaults."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(out)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(out)


def main() -> None:
    """Reads the few options, trains, writes."""
    parser = argparse.ArgumentParser(prog="python -m demo.train_whisper", description="Trains the demo speech model.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--checkpoints", type=Path, help="directory of unfinished checkpoints (default: --out)")
    parser.add_argument("--start-from", type=Path, help="unfinished checkpoints to go on from (default: from nothing)")
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads of the training process (default: 1)")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=f"(default: {default})"
        )
    given = vars(parser.parse_args())
    torch.set_num_threads(given.pop("num_threads"))
    out: Path = given.pop("out")
    start_from: Path | None = given.pop("start_from")
    checkpoints: Path = given.pop("checkpoints") or out
    recipe = Recipe(**given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, tokenizer = train(recipe, checkpoints, start_from)
    save(model, tokenizer, out)
    (out / "training.json").write_text(json.dumps({"recipe": asdict(recipe)}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
