"""The corpus: every skill in its share, under system prompts of many kinds, alone or several in one chat.

Knows nothing of tokenizers, templates or torch: the same seed gives the same chats anywhere.
Called by the tokenizer's, the trainer's and the evaluator's scripts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from demo.corpus import extraction, lists, memory, numbers, server_facts, small_talk, words
from demo.corpus.conversation import Conversation, Exchange, Message, Skill, is_held_out
from demo.corpus.lexicon import COMPANIES
from demo.corpus.texts import templates
from demo.corpus.tool_chats import tool_chat

# Shares: by how much there is to learn, not by how often it is asked.
_SKILLS: dict[str, tuple[float, Skill]] = {
    "options": (8, server_facts.option_question),
    "server": (8, server_facts.general_question),
    "talk": (10, small_talk.talk),
    "unknown": (6, small_talk.unknown),
    "capital": (2, small_talk.capital),
    "story": (1, small_talk.story),
    "spell": (9, words.spell),
    "letters": (5, words.letter_question),
    "reverse": (2, words.reverse),
    "repeat": (13, words.repeat),
    "count": (8, numbers.count),
    "sums": (8, numbers.sums),
    "things": (4, lists.things),
    "first_of": (3, lists.first_of),
    "series": (2, lists.series),
    "fields": (9, extraction.by_fields),
    "schema": (6, extraction.by_schema),
    "json_list": (3, extraction.as_list),
    "json_pairs": (5, extraction.as_json),
    "never_told": (1, memory.never_told),
    "told": (1, memory.told),
}
Stage = Literal["early", "main", "last"]
# Early: single questions only, and mostly those whose answer is copied from the prompt: to look back is what everything
# else needs, and it is learnt soonest from short chats full of it. Last: more of what is still wrong by then.
_SHARES: dict[Stage, dict[str, float]] = {
    "early": {"repeat": 30, "spell": 12, "told": 8, "json_pairs": 12, "json_list": 6, "fields": 10, "letters": 4},
    "main": {},
    "last": {
        "spell": 36, "letters": 16, "reverse": 7, "sums": 22, "things": 12, "first_of": 8, "talk": 16, "server": 12,
        "never_told": 5,
    },
}  # fmt: skip
_CHATS: dict[Stage, dict[str, float]] = {
    "early": {"one": 100},
    "main": {"one": 100, "several": 14, "memory": 10, "own_name": 2, "extract_system": 4, "tools": 28},
    "last": {"one": 100, "several": 8, "memory": 8, "own_name": 2, "extract_system": 3, "tools": 13},
}


def generate(
    seed: int, num_conversations: int, *, held_out: bool = False, skill: str | None = None, stage: Stage = "main"
) -> Iterator[Conversation]:
    """So many chats of the training part, or of the part kept from it.

    Args:
        seed: the same seed gives the same chats, in the same order.
        held_out: chats whose key is held out, instead of those whose key is not.
        skill: only this one, named as in `skill_names`.
        stage: the mixture for a part of training.
    """
    rng = random.Random(seed)
    made = 0
    while made < num_conversations:
        conversation = _conversation(rng, skill, stage)
        if is_held_out(conversation.key) == held_out:
            made += 1
            yield conversation


def skill_names() -> tuple[str, ...]:
    """Every skill that `generate` can be asked for alone."""
    return (*_SKILLS, "memory", "own_name", "extract_system", "tools")


def _conversation(rng: random.Random, skill: str | None, stage: Stage) -> Conversation:
    chats = _CHATS[stage]
    kind = (
        rng.choices(tuple(chats), tuple(chats.values()))[0] if skill is None else "one" if skill in _SKILLS else skill
    )
    match kind:
        case "tools":
            conversation = tool_chat(rng, _another(rng))
        case "memory":
            between = [_another(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 3, 5)))]
            conversation = memory.remember(rng, between)
        case "own_name":
            return memory.own_name(rng)
        case "extract_system":
            return extraction.by_system_schema(rng)
        case "several":
            exchanges = [_exchange(rng, stage=stage)[1], *(_another(rng) for _ in range(rng.choice((1, 1, 2, 3))))]
            conversation = Conversation("several", exchanges[0].key, memory.as_messages(exchanges))
        case _:
            name, exchange = _exchange(rng, skill, stage)
            conversation = Conversation(name, exchange.key, memory.as_messages([exchange]))
    system = _system(rng)
    return Conversation(conversation.skill, conversation.key, (*system, *conversation.messages), conversation.tools)


def _exchange(rng: random.Random, skill: str | None = None, stage: Stage = "main") -> tuple[str, Exchange]:
    shares = {name: _SHARES[stage].get(name, share) for name, (share, _) in _SKILLS.items()}
    name = skill or rng.choices(tuple(shares), tuple(shares.values()))[0]
    return name, _SKILLS[name][1](rng)


def _another(rng: random.Random) -> Exchange:
    """An exchange beside the one that a chat is about.

    Never one that is held out, which would slip into training by the side door, nor one about what was told before,
    whose answer would depend on the rest of the chat.
    """
    while True:
        name, exchange = _exchange(rng)
        if name not in ("told", "never_told") and not is_held_out(exchange.key):
            return exchange


def _system(rng: random.Random) -> tuple[Message, ...]:
    if rng.random() < 0.45:
        return ()
    date = f"20{rng.randint(24, 35)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    content = rng.choice(templates("system_prompts")).format(date=date, company=rng.choice(COMPANIES))
    return ({"role": "system", "content": content},)
