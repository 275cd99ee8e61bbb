"""Scores the demo chat model on chats that training never saw, and finds the answers that tests may rely on.

Knows nothing of the server; `python -m demo.evaluate_chat --model demo/chat` fills in the card and golden.json.
Called by hand after training.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.chat_tokenizer import TURN_END, Example, encode
from demo.corpus.mixture import generate, skill_names
from demo.golden_prompts import Golden, goldens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Below this gap between the two likeliest tokens another kernel or number format may choose the other one.
MIN_GAP = 0.5
_HELD_OUT_SEED = 7_777_777


@dataclass(frozen=True, slots=True)
class Score:
    """Answers of one skill: how many there were, how many came out exactly as expected, how surely."""

    skill: str
    num_answers: int
    num_exact: int
    num_sure: int


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, skill: str, num_chats: int) -> Score:
    """Every assistant turn of held-out chats, each after the history as it should have been."""
    num_answers = num_exact = num_sure = 0
    for conversation in generate(_HELD_OUT_SEED, num_chats, held_out=True, skill=skill):
        for is_exact, gap in answers(model, encode(tokenizer, conversation)):
            num_answers += 1
            num_exact += is_exact
            num_sure += is_exact and gap >= MIN_GAP
    return Score(skill, num_answers, num_exact, num_sure)


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
    table = _table(scores)
    found, missed = find_goldens(given.model, tokenizer)
    print(table, *missed, f"{len(found)} goldens", sep="\n")
    if given.dry_run:
        return
    (given.model / "golden.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    card = given.model / "README.md"
    marked = re.sub(
        r"(?<=<!-- scores -->\n).*(?=<!-- /scores -->)",
        lambda _: table + "\n",
        card.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    card.write_text(marked, encoding="utf-8")


def _table(scores: list[Score]) -> str:
    rows = [
        f"| {s.skill} | {s.num_answers} | {s.num_exact / s.num_answers:.0%} | {s.num_sure / s.num_answers:.0%} |"
        for s in scores
    ]
    return "\n".join(("| skill | answers | exact | exact, gap >= 0.5 |", "|---|---|---|---|", *rows))


if __name__ == "__main__":
    main()
