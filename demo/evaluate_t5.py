"""Scores the demo T5 on items that training never saw, and finds the answers that tests may rely on.

Knows nothing of the server; `python -m demo.evaluate_t5 --model demo/t5` fills in the card and golden.json.
Called by hand after training; `answers` also by tests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from demo.corpus.conversation import Exchange
from demo.corpus.text_tasks import generate, task_names
from demo.corpus.texts import read
from demo.scores import HELD_OUT_SEED, MIN_GAP, count, table, write_into_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_ROWS = 64
_MAX_NEW_TOKENS = 64


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[Exchange]
) -> Iterator[tuple[bool, float]]:
    """For each exchange: whether greedy decoding would give just its answer, and the least gap on its way.

    Greedy decoding gives the answer if and only if each of its tokens is the likeliest after those before it, so one
    forward over all of them decides it.
    """
    for start in range(0, len(exchanges), _ROWS):
        rows = exchanges[start : start + _ROWS]
        prompts = tokenizer([row.prompt for row in rows], padding=True, return_tensors="pt")
        labels = tokenizer([row.answer for row in rows], padding=True, return_tensors="pt")
        before = model.prepare_decoder_input_ids_from_labels(labels.input_ids)
        logits = model(
            input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, decoder_input_ids=before
        ).logits.float()  # [B, U, V]
        top = logits.topk(2)
        is_padding = labels.attention_mask == 0
        is_right = ((top.indices[..., 0] == labels.input_ids) | is_padding).all(1)  # [B]
        gaps = (top.values[..., 0] - top.values[..., 1]).masked_fill(is_padding, float("inf")).amin(1)  # [B]
        yield from zip(is_right.tolist(), gaps.tolist(), strict=True)


@torch.inference_mode()
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[list[int], str, float]:
    """Token ids (`</s>` last) and text of the greedy answer, and the least gap between the two likeliest tokens."""
    output = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=_MAX_NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[0, 1:].tolist()
    gaps = [float(top[0] - top[1]) for top in (step[0].float().topk(2).values for step in output.logits)]
    return new, tokenizer.decode(new, skip_special_tokens=True), min(gaps)


def find_goldens(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[list[dict[str, Any]], list[str]]:
    """The prompts answered as expected, surely and alike in float32 and bfloat16; and a line for each of the others."""
    types = (torch.float32, torch.bfloat16)
    models = [AutoModelForSeq2SeqLM.from_pretrained(model_dir, dtype=dtype) for dtype in types]
    found, missed = [], []
    for name, said in read("golden_t5").items():
        (ids, text, gap), (small_ids, _, small_gap) = (greedy(model, tokenizer, said["prompt"]) for model in models)
        gap = min(gap, small_gap)
        if text != said["answer"] or ids != small_ids or gap < MIN_GAP:
            missed.append(f"{name}: {text!r}, gap {gap:.2f}" + ("" if ids == small_ids else ", other in bfloat16"))
            continue
        found.append({"name": name} | said | {"num_tokens": len(ids), "min_gap": round(gap, 2)})
    return found, missed


def main() -> None:
    """Scores, goldens, the card."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate_t5", description="Scores the demo T5.")
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint; its card is updated")
    parser.add_argument("--num-items", type=int, default=1000, help="held-out items of each task (default: 1000)")
    parser.add_argument("--show", action="store_true", help="print each item that goes wrong")
    parser.add_argument("--dry-run", action="store_true", help="print only, write nothing")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(given.model, dtype=torch.float32)
    scores = []
    for task in task_names():
        exchanges = list(generate(HELD_OUT_SEED, given.num_items, held_out=True, task=task))
        results = list(answers(model, tokenizer, exchanges))
        scores.append(count(task, results))
        if given.show:
            wrong = (e for e, (is_exact, _) in zip(exchanges, results, strict=True) if not is_exact)
            for exchange in wrong:
                said = greedy(model, tokenizer, exchange.prompt)[1]
                print(f"{exchange.prompt!r}: {said!r} instead of {exchange.answer!r}")
    found, missed = find_goldens(given.model, tokenizer)
    scored = table(scores, heading="task", num_decimals=1)
    print(scored, *missed, f"{len(found)} goldens", sep="\n")
    if given.dry_run:
        return
    (given.model / "golden.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_into_card(given.model / "README.md", scored)


if __name__ == "__main__":
    main()
