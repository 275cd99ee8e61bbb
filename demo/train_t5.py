"""Trains the demo T5 from a seed: corpus, tokenizer, weights, all that a checkpoint directory needs.

Knows nothing of the server; `python -m demo.train_t5 --out demo/t5` is the whole of it.
Called by hand; demo/README.md says what to expect.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration

from demo.corpus.text_tasks import Level, generate
from demo.optimization import Optimizer, Progress, Rates, running_mean
from demo.t5_tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the result.

    Args:
        num_steps: optimizer steps.
        max_minutes: wall time; where it runs out first the schedule is cut short, and the result is the machine's.
        rows_per_step: exchanges in one step.
        first_share, second_share: how much of training has the inputs of level 0 (one form, short), of level 1.
        decay_share: how much of it has a falling learning rate.
        matrix_lr, vector_lr: peak learning rates of Muon (matrices) and AdamW (embeddings, position biases, norms).
    """

    seed: int = 0
    num_steps: int = 2400
    max_minutes: float = 42.0
    rows_per_step: int = 96
    matrix_lr: float = 0.02
    vector_lr: float = 0.03
    warmup_steps: int = 60
    decay_share: float = 0.5
    first_share: float = 0.08
    second_share: float = 0.1


_LEVELS: tuple[Level, ...] = (0, 1, 2)
# Steps drawn at once, and sorted so that rows of a step have like lengths: padding costs time.
_POOL_STEPS = 16
_WIDTH_STEP = 8
_MAX_WIDTH = 128
_QUERY_SCALE = 0.18


@dataclass(frozen=True, slots=True)
class Batch:
    """Ids of the prompts [B, T], which of them count [B, T], ids of the answers [B, U] with -100 behind them."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def build_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """The untrained model: T5's shape, very small, with the gated feed-forward of v1.1."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=32,
            d_ff=384,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=6,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,  # Nothing is seen twice.
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    recipe: Recipe, checkpoints: Path | None = None, start_from: Sequence[Path] = ()
) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """The trained model, in bfloat16, and its tokenizer.

    Args:
        checkpoints: where one is left behind every 200 steps, named by the step.
        start_from: checkpoints of one training to go on from, at the mean of their weights.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(start_from[0]) if start_from else train_tokenizer(recipe.seed)
    model = mean_model(start_from) if start_from else build_model(tokenizer)
    model.set_attn_implementation("eager")
    _log.info("parameters: %s", sum(p.numel() for p in model.parameters()))
    rates = Rates(
        recipe.num_steps,
        recipe.max_minutes,
        recipe.matrix_lr,
        recipe.vector_lr,
        recipe.warmup_steps,
        recipe.decay_share,
    )
    optimizer = Optimizer(model, rates, _matrix_scale)
    made = {level: _batches(recipe, tokenizer, level) for level in _LEVELS}
    progress, mean_loss = Progress(rates), 0.0
    while progress.share < 1:
        second_ends = recipe.first_share + recipe.second_share
        level: Level = 0 if progress.share < recipe.first_share else 1 if progress.share < second_ends else 2
        loss = _loss(model, next(made[level]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(progress.rate())
        progress.advance()
        mean_loss = running_mean(mean_loss, loss.item(), progress.step)
        if progress.step % 20 == 0:
            _log.info(
                "step %d  %.1f min  level %d  loss %.4f  progress %.3f",
                progress.step,
                progress.minutes,
                level,
                mean_loss,
                progress.share,
            )
        if checkpoints is not None and progress.step % 200 == 0:
            save(model, tokenizer, checkpoints / f"step-{progress.step}")
    return model, tokenizer


def mean_model(checkpoints: Sequence[Path]) -> T5ForConditionalGeneration:
    """The model, in float32, whose weights are the mean of these checkpoints'.

    While the learning rate is high each checkpoint is wrong in ways of its own; their mean is right far more often.
    """
    models = [T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32) for path in checkpoints]
    mean = models[0]
    with torch.no_grad():
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            parameters[0].copy_(torch.stack(parameters).mean(0))
    return mean


def _matrix_scale(name: str, parameter: torch.nn.Parameter) -> float:
    """How fast a matrix may change; 0 for the tables in which things are looked up: embeddings and position biases.

    T5 does not divide attention scores by the root of the head's size; its queries are that much smaller instead, and
    at the pace of the others they would drown the position biases within a hundred steps.
    """
    if parameter.ndim != 2 or ".block." not in name or "relative_attention_bias" in name:
        return 0.0
    return _QUERY_SCALE if name.endswith(".q.weight") else 1.0


def _loss(model: T5ForConditionalGeneration, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    before = model.prepare_decoder_input_ids_from_labels(batch.labels)  # [B, U], a place to the right
    output = model(input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=before, use_cache=False)
    logits = output.logits  # [B, U, V]
    return functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, level: Level) -> Iterator[Batch]:
    """Fresh exchanges without end, in batches of like length; none is seen twice, but by chance."""
    rng = random.Random(len(_LEVELS) * recipe.seed + level)
    while True:
        exchanges = list(generate(rng.getrandbits(48), _POOL_STEPS * recipe.rows_per_step, level=level))
        prompts = tokenizer([exchange.prompt for exchange in exchanges]).input_ids
        answers = tokenizer([exchange.answer for exchange in exchanges]).input_ids
        pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(p) <= _MAX_WIDTH]
        pairs.sort(key=lambda pair: len(pair[0]) // _WIDTH_STEP)
        batches = [pairs[i : i + recipe.rows_per_step] for i in range(0, len(pairs), recipe.rows_per_step)]
        rng.shuffle(batches)
        yield from (_padded(batch) for batch in batches)


def _padded(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    width, answer_width = (-(-max(len(pair[side]) for pair in pairs) // _WIDTH_STEP) * _WIDTH_STEP for side in (0, 1))
    ids = torch.zeros(len(pairs), width, dtype=torch.long)  # [B, T]; 0 is the padding
    mask = torch.zeros_like(ids)
    labels = torch.full((len(pairs), answer_width), -100)  # [B, U]
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
        labels[row, : len(answer)] = torch.tensor(answer)
    return Batch(ids, mask, labels)


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the checkpoint, with tokenizer and generation defaults."""
    model.generation_config = GenerationConfig(
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Reads the few options, trains, writes."""
    parser = argparse.ArgumentParser(prog="python -m demo.train_t5", description="Trains the demo T5.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--checkpoints", type=Path, help="directory for unfinished checkpoints (default: none)")
    parser.add_argument(
        "--start-from", type=Path, nargs="+", default=(), metavar="DIR",
        help="a checkpoint to go on from, or several to go on from their mean (default: from nothing)",
    )  # fmt: skip
    parser.add_argument("--num-threads", type=int, default=1, help="threads of the CPU to use (default: 1)")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=f"(default: {default})"
        )
    given = vars(parser.parse_args())
    out: Path = given.pop("out")
    start_from: Sequence[Path] = given.pop("start_from")
    checkpoints: Path | None = given.pop("checkpoints")
    torch.set_num_threads(given.pop("num_threads"))
    recipe = Recipe(**given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, tokenizer = train(recipe, checkpoints, start_from)
    save(model, tokenizer, out)
    (out / "training.json").write_text(json.dumps({"recipe": asdict(recipe)}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
