"""A tour of the API with the openai package: models, chat, stream, completions, log-probabilities, an error.

Knows nothing of the server but its address; start one first: ./start.sh --hf-model demo
Run as `python example_client.py [--base-url URL] [--api-key KEY]`; the exit code is 1 when the tour cannot be made.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

DEFAULT_BASE_URL = "http://127.0.0.1:7088/v1"


def main(argv: Sequence[str]) -> int:
    """Makes the tour; returns the exit code."""
    parser = argparse.ArgumentParser(description="A tour of the API with the openai package.")
    parser.add_argument("--base-url", default=DEFAULT_BASE_URL, help="where the server is (default: %(default)s)")
    # The package insists on a key; a server without --api-key takes any.
    parser.add_argument("--api-key", default="none", help="key, if the server asks for one")
    arguments = parser.parse_args(argv)
    try:
        import openai
    except ImportError:
        return _fail("the openai package is missing: pip install openai")
    client = openai.OpenAI(base_url=arguments.base_url, api_key=arguments.api_key)
    try:
        tour(client)
    except openai.APITimeoutError:
        return _fail(f"the server at {arguments.base_url} did not answer in time")
    except openai.APIConnectionError:
        return _fail(f"no server at {arguments.base_url}; start one with: ./start.sh --hf-model demo")
    except openai.APIStatusError as error:
        return _fail(f"the server answered {error.status_code}: {_message(error)}")
    return 0


def tour(client: OpenAI) -> None:
    """Every kind of request once."""
    model = show_models(client)
    chat(client, model)
    stream(client, model)
    complete(client, model)
    show_logprobs(client, model)
    handle_an_error(client)


def show_models(client: OpenAI) -> str:
    """Lists what is served; returns the name that requests use."""
    _title("Models")
    models = client.models.list().data
    for entry in models:
        facts = entry.model_extra or {}
        print(
            f"{entry.id}: {facts.get('architecture')}, {facts.get('dtype')} on {facts.get('device')}, "
            f"context of {facts.get('max_model_len')} tokens"
        )
    return models[0].id


def chat(client: OpenAI, model: str) -> None:
    """One answer, whole."""
    _title("Chat")
    question = "Hello! What can you do?"
    print(f"> {question}")
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
        max_tokens=60,
        temperature=0,
    )
    choice = completion.choices[0]
    print(choice.message.content)
    if completion.usage is not None:
        usage = completion.usage
        print(f"({choice.finish_reason}; {usage.prompt_tokens} tokens read, {usage.completion_tokens} written)")


def stream(client: OpenAI, model: str) -> None:
    """One answer as it is written."""
    _title("Chat, streamed")
    question = "Count from one to ten."
    print(f"> {question}")
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=60,
        temperature=0.7,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    num_chunks = 0
    for chunk in chunks:
        num_chunks += 1
        if chunk.choices:  # the last chunk holds the usage only
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print(f"\n({num_chunks} chunks)")


def complete(client: OpenAI, model: str) -> None:
    """Plain text, continued in two ways."""
    _title("Text completion")
    prompt = "Once upon a time"
    completion = client.completions.create(
        model=model, prompt=prompt, max_tokens=20, n=2, temperature=0.8, seed=1, stop=["\n\n"]
    )
    for choice in completion.choices:
        print(f"{prompt}|{choice.text}")


def show_logprobs(client: OpenAI, model: str) -> None:
    """How sure the model is of each token, and what it nearly said."""
    _title("Log-probabilities")
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = completion.choices[0].logprobs
    for entry in (logprobs.content if logprobs else None) or []:
        others = ", ".join(f"{other.token!r} {math.exp(other.logprob):.0%}" for other in entry.top_logprobs)
        print(f"{entry.token!r:>16} {math.exp(entry.logprob):>5.0%}   of {others}")


def handle_an_error(client: OpenAI) -> None:
    """What a mistake looks like to a client."""
    import openai

    _title("An error, handled")
    try:
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "Hi"}])
    except openai.NotFoundError as error:
        print(f"{type(error).__name__}: {_message(error)} (code {error.code})")


def _message(error: object) -> str:
    """The server's own words, without the package's wrapping."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error)


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def _fail(line: str) -> int:
    print(f"example_client.py: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
