"""Scores the demo chat model on chats that training never saw, and finds the answers that tests may rely on.

Knows nothing of the server; `python -m demo.evaluate_chat --model demo/chat` fills in the card and golden.json.
Called by hand after training.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.chat_tokenizer import TURN_END, Example, encode
from demo.corpus.mixture import generate, skill_names
from demo.golden_prompts import Golden, goldens
from demo.scores import HELD_OUT_SEED, MIN_GAP, Score, count, table, write_into_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, skill: str, num_chats: int) -> Score:
    """Every assistant turn of held-out chats, each after the history as it should have been."""
    chats = generate(HELD_OUT_SEED, num_chats, held_out=True, skill=skill)
    return count(skill, (turn for chat in chats for turn in answers(model, encode(tokenizer, chat))))


@torch.inference_mode()
def answers(model: PreTrainedModel, example: Example) -> list[tuple[bool, float]]:
    """For each assistant turn: whether greedy decoding would give just this answer, and the least gap on its way.

    Greedy decoding gives the reference if and only if each of its tokens is the likeliest after those before it, so one
    forward over the whole chat decides it.
    """
    logits = model(torch.tensor([example.ids])).logits[0].float()  # [T, V]
    top = logits.topk(2)
    turns = []
    for is_learnt, group in groupby(range(len(example.ids)), key=lambda i: example.is_learnt[i]):
        if is_learnt:
            positions = list(group)
            gap = min(float(top.values[i - 1, 0] - top.values[i - 1, 1]) for i in positions)
            turns.append((all(int(top.indices[i - 1, 0]) == example.ids[i] for i in positions), gap))
    return turns


@torch.inference_mode()
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, golden: Golden) -> tuple[list[int], str, float]:
    """Token ids and text of the greedy answer, and the least gap between the two likeliest tokens on its way."""
    ids = tokenizer.apply_chat_template(
        list(golden.messages), tools=list(golden.tools) or None, add_generation_prompt=True, return_dict=False
    )
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=600, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = output.sequences[0, len(ids) :].tolist()
    gaps = [float(top[0] - top[1]) for top in (step[0].float().topk(2).values for step in output.logits)]
    return new, tokenizer.decode(new).removesuffix(TURN_END), min(gaps)


def find_goldens(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[list[dict[str, Any]], list[str]]:
    """The chats answered as expected, surely and alike in float32 and bfloat16; and a line for each of the others."""
    models = [AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    found, missed = [], []
    for golden in goldens():
        (ids, text, gap), (small_ids, _, small_gap) = (greedy(model, tokenizer, golden) for model in models)
        gap = min(gap, small_gap)
        if text != golden.answer or ids != small_ids or gap < MIN_GAP:
            missed.append(
                f"{golden.name}: {text!r}, gap {gap:.2f}" + ("" if ids == small_ids else ", other in bfloat16")
            )
            continue
        entry = {"name": golden.name, "messages": list(golden.messages), "tools": list(golden.tools)}
        found.append(entry | {"answer": text, "num_tokens": len(ids), "min_gap": round(gap, 2)})
    return found, missed


def main() -> None:
    """Scores, goldens, the card."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate_chat", description="Scores the demo chat model.")
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint; its card is updated")
    parser.add_argument("--num-chats", type=int, default=100, help="held-out chats of each skill (default: 100)")
    parser.add_argument("--dry-run", action="store_true", help="print only, write nothing")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    scores = [score(model, tokenizer, skill, given.num_chats) for skill in skill_names()]
    found, missed = find_goldens(given.model, tokenizer)
    print(table(scores), *missed, f"{len(found)} goldens", sep="\n")
    if given.dry_run:
        return
    (given.model / "golden.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_into_card(given.model / "README.md", table(scores))


if __name__ == "__main__":
    main()
