"""The door: flags and environment become Settings, Settings become a running server, its end an exit code.

Knows nothing of models or requests.
Run as `python main.py`, or `python main.py plan` for a dry run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from command_line import take_word
from config import Settings, StartupError

logger = logging.getLogger(__name__)

# Their INFO lines say what ours already say, their DEBUG lines drown ours.
_LOUD_LIBRARIES = ("asyncio", "filelock", "httpcore", "httpx", "huggingface_hub", "sse_starlette", "urllib3", "uvicorn")

# How long GNU OpenMP's threads spin while they wait for each other, before they sleep. By default long: on a machine
# that does anything else beside serving, threads then spend their time slices waiting for one that is not running.
# Measured, two threads on two cores, a decode step of a 135M model: 180 to 2,000 ms on a busy machine, 66 to 90 with
# this; 21 ms and 18 ms on a quiet one.
_SPIN_COUNT = ("GOMP_SPINCOUNT", "3000")


_DOES_NOT_FIT = 3  # of a plan; not the 2 of a mistake, so that a script can tell them apart


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serves until told to end; returns the exit code: 1 when loading failed, 2 when an option cannot be honoured.

    With the word `plan` among the options: says what serving would take instead; 3 when it would not fit this machine.
    """
    is_plan, argv = take_word("plan", argv)
    if is_plan:
        return _plan(Settings.from_sources(argv, environ))
    settings = Settings.from_sources(argv, environ)
    os.environ.setdefault(*_SPIN_COUNT)  # read once, when torch is loaded
    _set_up_logging(settings.loglevel)
    _point_out(settings, environ)
    # Until the server takes signals over: there is nothing to finish yet.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    # Imported here, so that --help and mistakes are answered at once.
    from app import create_app
    from model_manager import ModelManager
    from serving import Server, bind

    try:
        sockets = bind(settings.host, settings.port)
    except StartupError as error:
        return _fail(error)
    manager = ModelManager(settings)
    server = Server(create_app(settings, manager), manager, settings)
    server.run(sockets)
    return 0 if server.failure is None else _fail(server.failure)


def _plan(settings: Settings) -> int:
    """Prints what these options would take and whether it fits; returns the exit code."""
    _set_up_logging(settings.loglevel)
    from runtime.plan_text import plan_text
    from runtime.planning import dry_run

    try:
        found = dry_run(settings)
    except StartupError as error:
        return _fail(error)
    print(plan_text(found), flush=True)
    return 0 if found.plan.fits else _DOES_NOT_FIT


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for library in _LOUD_LIBRARIES:
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level]))


def _point_out(settings: Settings, environ: Mapping[str, str]) -> None:
    """Two defaults that may surprise."""
    name = environ.get("HOSTNAME", "")
    if name and not settings.is_given("host"):
        logger.info("HOSTNAME=%s is no address of this machine: listening on %s", name, settings.host)
    if not settings.api_key and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logger.info("no --api-key: whoever can reach %s port %d may use the model", settings.host, settings.port)


def _leave(signal_number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def _fail(error: BaseException) -> int:
    """Says why the server ends, in the last line; returns the exit code."""
    if not isinstance(error, StartupError):
        logger.error("loading failed", exc_info=error)
    print(f"main.py: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, StartupError) else 1


if __name__ == "__main__":
    exit_code = main(sys.argv[1:], os.environ)
    logging.shutdown()
    # Python would take down torch's modules one by one, for seconds, and might crash if a model is still being loaded.
    os._exit(exit_code)
