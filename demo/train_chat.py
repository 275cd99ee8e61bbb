"""Trains the demo chat model from a seed: corpus, tokenizer, weights, all that a checkpoint directory needs.

Knows nothing of the server; `python -m demo.train_chat --out demo/chat` is the whole of it.
Called by hand; demo/README.md says what to expect.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from demo.chat_tokenizer import MAX_POSITIONS, TEXT_END, TURN_END, Example, encode, train_tokenizer
from demo.corpus.mixture import Stage, generate
from demo.corpus.server_facts import option_facts
from demo.optimization import Optimizer, Progress, Rates, running_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the result.

    Args:
        num_steps: optimizer steps.
        max_minutes: wall time; where it runs out first the schedule is cut short, and the result is the machine's.
        batches_per_step: micro-batches of about 2,000 tokens in one step.
        early_share, last_share: how much of training has the early mixture, the last one.
        decay_share: how much of it has a falling learning rate.
        matrix_lr, vector_lr: peak learning rates of Muon (matrices) and AdamW (embeddings, norms).
    """

    seed: int = 0
    num_steps: int = 3400
    max_minutes: float = 55.0
    batches_per_step: int = 2
    matrix_lr: float = 0.02
    vector_lr: float = 0.004
    warmup_steps: int = 40
    decay_share: float = 0.45
    early_share: float = 0.25
    last_share: float = 0.3


# Rows of a micro-batch have like lengths, for padding costs time; the widths are few, for a new shape costs seconds.
_WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
_BATCH_TOKENS = 2048
_STAGES: tuple[Stage, ...] = ("early", "main", "last")
# Keys after the last query of a chunk are not looked at: nearly half of the work where T is long.
_QUERY_CHUNK = 128
Batch = tuple[Tensor, Tensor]


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The untrained model: Qwen3's shape, very small, tied embeddings."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def train(
    recipe: Recipe, checkpoints: Path, start_from: Path | None = None
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The trained model, in bfloat16, and its tokenizer; a checkpoint is left behind every 200 steps."""
    torch.manual_seed(recipe.seed)
    if start_from is None:
        tokenizer = train_tokenizer(recipe.seed)
        model = build_model(tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(start_from)
        model = Qwen3ForCausalLM.from_pretrained(start_from, dtype=torch.float32)
    AttentionInterface.register("short", _short_attention)
    model.set_attn_implementation("short")
    _log.info("parameters: %s", sum(p.numel() for p in model.parameters()))
    rates = Rates(
        recipe.num_steps,
        recipe.max_minutes,
        recipe.matrix_lr,
        recipe.vector_lr,
        recipe.warmup_steps,
        recipe.decay_share,
    )
    optimizer = Optimizer(model, rates, lambda name, parameter: float(parameter.ndim == 2 and ".layers." in name))
    made = {stage: _batches(recipe, tokenizer, stage) for stage in _STAGES}
    progress, mean_loss, num_tokens = Progress(rates), 0.0, 0
    while progress.share < 1:
        stage: Stage = (
            "early"
            if progress.share < recipe.early_share
            else "main"
            if progress.share < 1 - recipe.last_share
            else "last"
        )
        batches = [next(made[stage]) for _ in range(recipe.batches_per_step)]
        num_tokens += sum(ids.numel() for ids, _ in batches)
        loss = _accumulate(model, batches)
        optimizer.step(progress.rate())
        progress.advance()
        mean_loss = running_mean(mean_loss, loss, progress.step)
        if progress.step % 20 == 0:
            _log.info(
                "step %d  %.1f min  loss %.4f  %.0f tokens/s  progress %.3f",
                progress.step,
                progress.minutes,
                mean_loss,
                num_tokens / progress.minutes / 60,
                progress.share,
            )
        if progress.step % 200 == 0:
            save(model, tokenizer, checkpoints)
    return model, tokenizer


def _accumulate(model: Qwen3ForCausalLM, batches: list[Batch]) -> float:
    """Adds the gradient of the mean loss over the assistant's tokens to the parameters; returns that loss."""
    num_learnt = sum(int((targets >= 0).sum()) for _, targets in batches)
    total = 0.0
    for ids, targets in batches:
        loss = _loss(model, ids, targets)
        (loss / num_learnt).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total / num_learnt


def _loss(model: Qwen3ForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy; logits are made only where there is something to learn, a third of the positions."""
    learnt = (targets.flatten() >= 0).nonzero().flatten()
    # A few more, whose targets are -100: the same shapes come again, for which the matrix product is already prepared.
    unlearnt = (targets.flatten() < 0).nonzero().flatten()
    rows = torch.cat((learnt, unlearnt[: -len(learnt) % 256]))  # [N]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
    logits = model.lm_head(hidden.flatten(0, 1)[rows])  # [N, V]
    return functional.cross_entropy(logits.float(), targets.flatten()[rows], reduction="sum")


def _short_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention [B, H, T, D] -> [B, T, H, D]; where T is short, several times as fast as torch's on a CPU."""
    num_rows, num_heads, width, head_dim = query.shape
    num_groups = num_heads // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, 1).flatten(0, 1) for x in (key, value))  # [B*H, T, D]
    query = query.flatten(0, 1)
    parts = []
    for start in range(0, width, _QUERY_CHUNK):
        end = min(start + _QUERY_CHUNK, width)
        hidden = torch.full((end - start, end), float("-inf"), dtype=query.dtype).triu(start + 1)
        scores = torch.baddbmm(hidden, query[:, start:end], key[:, :end].transpose(1, 2), alpha=scaling)
        parts.append(functional.softmax(scores, dim=-1) @ value[:, :end])
    output = torch.cat(parts, 1).view(num_rows, num_heads, width, head_dim)
    return output.transpose(1, 2).contiguous(), None


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: Stage) -> Iterator[Batch]:
    """Fresh conversations without end, in micro-batches of like length; none is seen twice, but by chance."""
    waiting: dict[int, list[Example]] = {width: [] for width in _WIDTHS}
    seeds = random.Random(len(_STAGES) * recipe.seed + _STAGES.index(stage))
    while True:
        for conversation in generate(seeds.getrandbits(48), 256, stage=stage):
            example = encode(tokenizer, conversation)
            width = next((width for width in _WIDTHS if len(example.ids) <= width), None)
            if width is None:
                continue
            waiting[width].append(example)
            if len(waiting[width]) == _BATCH_TOKENS // width:
                yield _padded(waiting[width], width)
                waiting[width] = []


def _padded(examples: list[Example], width: int) -> Batch:
    """Ids and targets, padded on the right, where causality hides it."""
    ids = torch.zeros(len(examples), width, dtype=torch.long)  # [B, T]
    targets = torch.full((len(examples), width), -100)  # [B, T]
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        learnt = torch.tensor(example.is_learnt[1:])
        targets[row, : length - 1] = torch.where(learnt, ids[row, 1:length], -100)
    return ids, targets


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the checkpoint, with tokenizer, template and generation defaults."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids([TURN_END, TEXT_END]),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Reads the few options, trains, writes."""
    parser = argparse.ArgumentParser(prog="python -m demo.train_chat", description="Trains the demo chat model.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--checkpoints", type=Path, help="directory of unfinished checkpoints (default: --out)")
    parser.add_argument("--start-from", type=Path, help="a checkpoint to go on from (default: from nothing)")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=f"(default: {default})"
        )
    given = vars(parser.parse_args())
    out: Path = given.pop("out")
    start_from: Path | None = given.pop("start_from")
    checkpoints: Path = given.pop("checkpoints") or out
    recipe = Recipe(**given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, tokenizer = train(recipe, checkpoints, start_from)
    save(model, tokenizer, out)
    facts = {"recipe": asdict(recipe), "options": [asdict(fact) for fact in option_facts()]}
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
