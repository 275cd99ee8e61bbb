"""The mechanics of a command line: flags in, their texts out, help, and one line about a mistake.

Knows nothing of what the options mean or which values are right.
Called by config.py.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import socket
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True, slots=True)
class Option:
    """One option as the command line shows it; `default` is already words."""

    name: str
    meaning: str
    default: str
    is_repeatable: bool = False

    @property
    def flag(self) -> str:
        """`--its-name`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its environment variable: the name in capitals, but for the host, which is called as in the shells."""
        return "HOSTNAME" if self.name == "host" else self.name.upper()


class _Formatter(argparse.HelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        """Meaning wrapped, default and variable whole on a line of their own: values with hyphens stay copyable."""
        meaning, *default = text.splitlines()
        return [*textwrap.wrap(meaning, width), *default]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage, which would push the reason off the screen."""
        refuse(message.removeprefix("argument "))


def parse_flags(argv: Sequence[str], options: Sequence[Option]) -> dict[str, str | list[str]]:
    """The texts given for each option, by field name.

    Args:
        argv: the arguments after the program's name.
        options: all that exist.
    Raises:
        SystemExit: 0 after --help, 2 for an unknown option or one without a value.
    """
    parser = _Parser(
        prog="main.py",
        usage="python main.py [plan] [options]",
        description="Serves a transformers model behind an OpenAI-compatible API. A flag beats its environment "
        "variable, the variable beats the default; an empty variable counts as not set. With the word plan among the "
        "options nothing is loaded or served: it prints what these options would take, from the model's config and "
        "the headers of its weights, and ends with exit code 0 when that fits this machine, 3 when it does not.",
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for option in options:
        parser.add_argument(
            option.flag,
            action="append" if option.is_repeatable else "store",
            help=f"{option.meaning}\n(default: {option.default}, env: {option.variable})".replace("%", "%%"),
        )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, [option.flag for option in options], n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        refuse(f"{word}: no such option; {hint}")
    return vars(given)


def take_word(word: str, argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether a word stands among the options, and the arguments without it; a value of an option does not count.

    It need not be the first: a container's entry point may put options of its own before those that it is given.
    """
    position = 0
    while position < len(argv):
        argument = argv[position]
        if argument == word:
            return True, [*argv[:position], *argv[position + 1 :]]
        takes_next = argument.startswith("--") and "=" not in argument and argument != "--help"
        position += 2 if takes_next else 1
    return False, list(argv)


def is_own_address(host: str) -> bool:
    """Whether a server could listen there: an IP address, or a name that resolves to an interface of this machine."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return _resolves_to_own_interface(host)
    return True


def _resolves_to_own_interface(name: str) -> bool:
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        # Only an address of this machine can be bound; there is no portable list of interfaces to compare with.
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False


def refuse(line: str) -> NoReturn:
    """Says in one line why the start ends, and ends it with exit code 2."""
    print(f"main.py: {line}", file=sys.stderr)
    raise SystemExit(2)
