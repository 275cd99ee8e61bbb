"""A tour of the API with the openai package: models, then what the served one knows (chat, texts, speech), an error.

Knows nothing of the server but its address; start one first: ./start.sh --hf-model demo (or demo-t5, demo-whisper)
Run as `python example_client.py [--base-url URL] [--api-key KEY] [--audio FILE]`; exit code 1: no tour could be made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

DEFAULT_BASE_URL = "http://127.0.0.1:7088/v1"
# Digits, spoken by a machine: what the demo speech model understands.
DEFAULT_AUDIO = Path(__file__).parent / "demo" / "whisper" / "audio" / "digits.flac"


def main(argv: Sequence[str]) -> int:
    """Makes the tour; returns the exit code."""
    parser = argparse.ArgumentParser(description="A tour of the API with the openai package.")
    parser.add_argument("--base-url", default=DEFAULT_BASE_URL, help="where the server is (default: %(default)s)")
    # The package insists on a key; a server without --api-key takes any.
    parser.add_argument("--api-key", default="none", help="key, if the server asks for one")
    parser.add_argument("--audio", type=Path, default=DEFAULT_AUDIO, help="what a speech model is given to hear")
    arguments = parser.parse_args(argv)
    try:
        import openai
    except ImportError:
        return _fail("the openai package is missing: pip install openai")
    client = openai.OpenAI(base_url=arguments.base_url, api_key=arguments.api_key)
    try:
        tour(client, arguments.audio)
    except openai.APITimeoutError:
        return _fail(f"the server at {arguments.base_url} did not answer in time")
    except openai.APIConnectionError:
        return _fail(f"no server at {arguments.base_url}; start one with: ./start.sh --hf-model demo")
    except openai.APIStatusError as error:
        return _fail(f"the server answered {error.status_code}: {_message(error)}")
    return 0


def tour(client: OpenAI, audio: Path) -> None:
    """Every kind of request that the served model knows, once."""
    model, family = show_models(client)
    if family == "speech":
        transcribe(client, model, audio)
        time_words(client, model, audio)
        stream_transcript(client, model, audio)
        translate(client, model, audio)
    elif family == "encoder-decoder":
        convert(client, model)
        search_with_beams(client, model)
    else:
        chat(client, model)
        stream(client, model)
        complete(client, model)
        show_logprobs(client, model)
        fill_in_a_form(client, model)
    handle_an_error(client, family)


def show_models(client: OpenAI) -> tuple[str, str]:
    """Lists what is served; returns the name that requests use, and what kind of model it is."""
    _title("Models")
    models = client.models.list().data
    for entry in models:
        facts = entry.model_extra or {}
        print(
            f"{entry.id}: {facts.get('architecture')}, {facts.get('dtype')} on {facts.get('device')}, "
            f"context of {facts.get('max_model_len')} tokens"
        )
    return models[0].id, str((models[0].model_extra or {}).get("family", "decoder"))


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


def fill_in_a_form(client: OpenAI, model: str) -> None:
    """An answer that is valid JSON of a given schema, whatever the model would rather say."""
    _title("Structured output")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Extract name and age as JSON: Maria is 34 years old."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
        max_tokens=150,
        seed=1,
    )
    print(json.loads(completion.choices[0].message.content or ""))


def convert(client: OpenAI, model: str) -> None:
    """An encoder-decoder: the prompt is what it reads, the answer what it makes of it."""
    _title("Text to text")
    for text in ("date: March 5th, 2021", "digits: two hundred and five", "words: 60017"):
        completion = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=60
        )
        print(f"{text} -> {completion.choices[0].message.content}")


def search_with_beams(client: OpenAI, model: str) -> None:
    """The likeliest answers as a whole; what OpenAI's API does not have goes into extra_body."""
    _title("Beam search")
    completion = client.completions.create(
        model=model, prompt="words: 1234", max_tokens=40, n=3, temperature=0, extra_body={"num_beams": 4}
    )
    for choice in completion.choices:
        print(choice.text)


def transcribe(client: OpenAI, model: str, audio: Path) -> None:
    """What is said, and as subtitles."""
    _title(f"Transcription of {audio.name}")
    with audio.open("rb") as file:
        print(client.audio.transcriptions.create(model=model, file=file).text)
    with audio.open("rb") as file:
        print(client.audio.transcriptions.create(model=model, file=file, response_format="srt"))


def time_words(client: OpenAI, model: str, audio: Path) -> None:
    """When each word is said."""
    _title("Word times")
    with audio.open("rb") as file:
        verbose = client.audio.transcriptions.create(
            model=model, file=file, response_format="verbose_json", timestamp_granularities=["word", "segment"]
        )
    print(f"language {verbose.language}, {verbose.duration} s")
    for word in verbose.words or []:
        print(f"{word.start:7.2f} {word.end:7.2f}  {word.word}")


def stream_transcript(client: OpenAI, model: str, audio: Path) -> None:
    """The text as it is decided."""
    _title("Transcription, streamed")
    with audio.open("rb") as file:
        for event in client.audio.transcriptions.create(model=model, file=file, stream=True):
            if event.type == "transcript.text.delta":
                print(event.delta, end="", flush=True)
    print()


def translate(client: OpenAI, model: str, audio: Path) -> None:
    """What is said, in English."""
    _title("Translation")
    with audio.open("rb") as file, warnings.catch_warnings():
        # The package calls its own method deprecated; the endpoint is not.
        warnings.simplefilter("ignore", DeprecationWarning)
        print(client.audio.translations.create(model=model, file=file).text)


def handle_an_error(client: OpenAI, family: str) -> None:
    """What a mistake looks like to a client."""
    import openai

    _title("An error, handled")
    try:
        if family == "speech":
            client.audio.transcriptions.create(model="no-such-model", file=("nothing.wav", b"RIFF"))
        else:
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
