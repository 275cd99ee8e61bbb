"""What the model knows of this server: each option from the real Settings, and a page of general facts.

Knows nothing of how the server works; the options are read, never written down here.
Called by mixture.py; `option_facts` also by tests and the trainer, who keep the list beside the weights.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from config import Settings
from demo.corpus.conversation import Exchange
from demo.corpus.phrasing import ask
from demo.corpus.texts import entries, templates

_UNFINISHED = " (not available yet)"


@dataclass(frozen=True, slots=True)
class OptionFact:
    """One option in words."""

    flag: str
    variable: str
    default: str
    meaning: str

    @property
    def bare(self) -> str:
        """The name without its dashes."""
        return self.flag.removeprefix("--")


@cache
def option_facts() -> tuple[OptionFact, ...]:
    """Every option of the real command line."""
    facts = []
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        default = str(extra["shown"] if isinstance(extra, dict) else field.default)
        meaning = (field.description or "").replace("`", "").partition(" (")[0].replace(_UNFINISHED, "")
        variable = "HOSTNAME" if name == "host" else name.upper()
        facts.append(OptionFact("--" + name.replace("_", "-"), variable, default, meaning.rstrip(".")))
    return tuple(facts)


def option_question(rng: random.Random) -> Exchange:
    """What an option does, its default, its variable, or which option does something."""
    fact = rng.choice(option_facts())
    named = rng.choice(
        (fact.flag, fact.flag, fact.bare, fact.bare.replace("-", " "), fact.bare.replace("-", "_"), fact.variable)
    )
    if fact.bare in ("host", "port", "seed", "revision") and named == fact.bare:
        named = rng.choice((f"the {fact.bare} option", f"option {fact.bare}", fact.flag))
    kind = rng.random()
    if kind < 0.35:
        phrases = templates("option_meaning")
        return ask(
            rng, phrases, f"`{fact.flag}`: {fact.meaning}. Default: {fact.default}. Variable: {fact.variable}.", o=named
        )
    if kind < 0.65:
        phrases = templates("option_default")
        return ask(rng, phrases, f"Default of `{fact.flag}`: {fact.default}.", o=named)
    if kind < 0.8:
        phrases = templates("option_variable")
        return ask(rng, phrases, f"The environment variable of `{fact.flag}` is {fact.variable}.", o=named)
    if sum(other.meaning == fact.meaning for other in option_facts()) > 1 or " " not in fact.meaning:
        return general_question(rng)
    phrases = templates("which_option")
    return ask(rng, phrases, f"`{fact.flag}`. Default: {fact.default}.", m=fact.meaning)


@cache
def general_facts() -> tuple[tuple[tuple[str, ...], str], ...]:
    """Questions about the server as a whole, each group with its answer; numbers come from the real defaults."""
    defaults = {fact.bare.replace("-", "_"): fact.default for fact in option_facts()}
    return tuple((questions, answer.format(**defaults)) for questions, answer in entries("server"))


def general_question(rng: random.Random) -> Exchange:
    """A question about the server as a whole."""
    questions, answer = rng.choice(general_facts())
    return ask(rng, questions, answer)
