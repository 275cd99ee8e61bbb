"""The corpus: every skill in its share, under system prompts of many kinds, alone or several in one chat.

Knows nothing of tokenizers, templates or torch: the same seed gives the same chats anywhere.
Called by the tokenizer's, the trainer's and the evaluator's scripts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from demo.corpus import extraction, lists, memory, numbers, server_facts, small_talk, words
from demo.corpus.conversation import Conversation, Exchange, Message, Skill, is_held_out
from demo.corpus.lexicon import COMPANIES
from demo.corpus.texts import templates
from demo.corpus.tool_chats import tool_chat

# Shares: by how much there is to learn, not by how often it is asked.
_SKILLS: dict[str, tuple[float, Skill]] = {
    "options": (10, server_facts.option_question),
    "server": (6, server_facts.general_question),
    "talk": (6, small_talk.talk),
    "unknown": (8, small_talk.unknown),
    "capital": (2, small_talk.capital),
    "story": (1, small_talk.story),
    "spell": (8, words.spell),
    "letters": (4, words.letter_question),
    "reverse": (2, words.reverse),
    "capitals": (2, words.capitals),
    "repeat": (12, words.repeat),
    "count": (5, numbers.count),
    "sums": (7, numbers.sums),
    "things": (4, lists.things),
    "series": (2, lists.series),
    "fields": (9, extraction.by_fields),
    "schema": (6, extraction.by_schema),
    "json_list": (3, extraction.as_list),
    "json_pairs": (4, extraction.as_json),
    "never_told": (1, memory.never_told),
    "told": (1, memory.told),
}
_CHATS = {"one": 100.0, "several": 14.0, "memory": 12.0, "own_name": 2.0, "extract_system": 4.0, "tools": 34.0}


def generate(
    seed: int, num_conversations: int, *, held_out: bool = False, skill: str | None = None
) -> Iterator[Conversation]:
    """So many chats of the training part, or of the part kept from it.

    Args:
        seed: the same seed gives the same chats, in the same order.
        held_out: chats whose key is held out, instead of those whose key is not.
        skill: only this one, named as in `skill_names`.
    """
    rng = random.Random(seed)
    made = 0
    while made < num_conversations:
        conversation = _conversation(rng, skill)
        if is_held_out(conversation.key) == held_out:
            made += 1
            yield conversation


def skill_names() -> tuple[str, ...]:
    """Every skill that `generate` can be asked for alone."""
    return (*_SKILLS, "memory", "own_name", "extract_system", "tools")


def _conversation(rng: random.Random, skill: str | None) -> Conversation:
    kind = (
        rng.choices(tuple(_CHATS), tuple(_CHATS.values()))[0] if skill is None else "one" if skill in _SKILLS else skill
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
            exchanges = [_exchange(rng)[1], *(_another(rng) for _ in range(rng.choice((1, 1, 2, 3))))]
            conversation = Conversation("several", exchanges[0].key, memory.as_messages(exchanges))
        case _:
            name, exchange = _exchange(rng, skill)
            conversation = Conversation(name, exchange.key, memory.as_messages([exchange]))
    system = _system(rng)
    return Conversation(conversation.skill, conversation.key, (*system, *conversation.messages), conversation.tools)


def _exchange(rng: random.Random, skill: str | None = None) -> tuple[str, Exchange]:
    name = skill or rng.choices(tuple(_SKILLS), [share for share, _ in _SKILLS.values()])[0]
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
