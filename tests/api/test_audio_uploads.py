"""Uploads of audio: what a form must hold, how large and how many may be read, and who is turned away before."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from models import TranscriptionBody
from tests.api.conftest import run_async
from tests.api.speech import speech_app
from tests.api.test_audio import TASKS
from tests.api.test_chat import HELLO
from tests.api.test_errors import error_of
from tests.api.test_multipart import BOUNDARY, END, upload


def test_a_file_is_needed_and_one_only() -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            none = await app.post(files={"nothing": (None, b"x")})
            empty = await app.post(files={"file": ("x.wav", b"")})
            twice = await app.post(files=[("file", ("x.wav", b"x")), ("file", ("y.wav", b"y"))])
            other = await app.post(files=[("file", ("x.wav", b"x")), ("image", ("y.png", b"y"))])
            for response, rule in (
                (none, "file is missing"),
                (empty, "file is empty"),
                (twice, "given twice"),
                (other, "only file may be"),
            ):
                assert response.status_code == 400 and rule in error_of(response)["message"]
            assert not app.manager.asked

    run_async(scenario())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 415),
        ({}, 415),
        ({"content-type": "multipart/form-data"}, 400),
        ({"content-type": "multipart/form-data; boundary=" + "x" * 300}, 400),
        ({"content-type": "multipart/form-data; boundary=x"}, 400),
    ],
)
def test_bodies_that_are_no_form_are_refused(headers: dict[str, str], status: int) -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            response = await app.client.post("/v1/audio/transcriptions", content=b"hello", headers=headers)
            assert response.status_code == status and error_of(response)

    run_async(scenario())


def test_uploads_have_a_limit_of_their_own() -> None:
    async def scenario() -> None:
        async with speech_app(max_body_size=1000, max_audio_size=5000) as app:
            for size, status in ((5000, 200), (5001, 413)):
                response = await app.post(files={"file": ("x.wav", b"x" * size)})
                assert response.status_code == status
            error = error_of(response)
            assert error["code"] == "request_too_large" and error["param"] == "file"
            assert "5000" in error["message"] and "--max-audio-size" in error["message"]
            # More than all parts may have together.
            response = await app.post(files={"file": ("x.wav", b"x" * 2_000_000)})
            assert response.status_code == 413 and "--max-audio-size" in error_of(response)["message"]
            response = await app.post({"prompt": "x" * 2**20})
            assert response.status_code == 413
            # And JSON has its own.
            response = await app.client.post("/v1/chat/completions", json={**HELLO, "user": "x" * 1000})
            assert response.status_code == 413 and "--max-body-size" in error_of(response)["message"]

    run_async(scenario())


@pytest.mark.parametrize("family", ["decoder", "encoder-decoder"])
def test_models_of_text_say_that_they_do_not_transcribe_before_they_read_the_upload(family: str) -> None:
    async def scenario() -> None:
        async with speech_app(family=family) as app:
            for task in TASKS:
                response = await app.client.post(f"/v1/audio/{task}", content=b"no form at all")
                error = error_of(response)
                assert (response.status_code, error["code"], error["param"]) == (404, "unsupported_model", "model")
                assert "org/tiny is no speech model" in error["message"]
            assert (await app.client.post("/v1/chat/completions", json=HELLO)).status_code == 200

    run_async(scenario())


def test_an_english_model_does_not_translate() -> None:
    async def scenario() -> None:
        async with speech_app(languages=()) as app:
            assert (await app.post(path="transcriptions")).status_code == 200
            response = await app.post(path="translations")
            error = error_of(response)
            assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "model")

    run_async(scenario())


def test_loading_draining_and_full_servers_take_no_uploads() -> None:
    async def scenario() -> None:
        async with speech_app(max_concurrent=1) as app:
            with app.manager.admission():
                response = await app.post()
            assert response.status_code == 429 and response.headers["retry-after"]
            assert not app.manager.asked
            await app.manager.drain(0)
            assert (await app.post()).status_code == 503
            assert not app.manager.asked

    run_async(scenario())


def test_uploads_that_are_being_read_are_bounded_in_number() -> None:
    async def scenario() -> None:
        async with speech_app(max_concurrent=2) as app:
            begun, may_end = asyncio.Semaphore(0), asyncio.Event()

            async def slowly() -> AsyncIterator[bytes]:
                yield upload(b"x")
                begun.release()
                await may_end.wait()
                yield END

            def post() -> asyncio.Task[httpx.Response]:
                headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
                url = "/v1/audio/transcriptions"
                return asyncio.create_task(app.client.post(url, content=slowly(), headers=headers))

            reading = [post(), post()]
            for _ in reading:
                await begun.acquire()
            assert app.manager.num_admitted == 0  # who sends slowly holds no place that others wait for
            response = await app.post()
            assert response.status_code == 429 and float(response.headers["retry-after"]) >= 1
            assert "2 uploads are being read, as many as --max-concurrent allows" in error_of(response)["message"]
            may_end.set()
            assert [(await task).status_code for task in reading] == [200, 200]
            assert (await app.post()).status_code == 200

    run_async(scenario())


def test_an_upload_that_breaks_off_leaves_its_place_to_others() -> None:
    async def scenario() -> None:
        async with speech_app(max_concurrent=1) as app:
            headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
            for _ in range(3):
                response = await app.client.post("/v1/audio/transcriptions", content=upload(b"x"), headers=headers)
                assert response.status_code == 400
            assert (await app.post()).status_code == 200

    run_async(scenario())


def test_the_time_of_uploading_is_not_spent_in_the_queue() -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            sent_s = 0.0

            async def slowly() -> AsyncIterator[bytes]:
                nonlocal sent_s
                yield upload(b"x")
                await asyncio.sleep(0.1)
                sent_s = time.monotonic()
                yield END

            headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
            response = await app.client.post("/v1/audio/transcriptions", content=slowly(), headers=headers)
            assert response.status_code == 200 and app.manager.asked[0].arrival_time_s >= sent_s > 0

    run_async(scenario())


def test_mixed_forms_are_answered_by_200_or_4xx() -> None:
    values = ["", "x", "0", "1", "-1", "1e400", "nan", "true", "null", "en", "{}", "[]", "auto", "word", "srt", "\x00"]
    names = [*TranscriptionBody.model_fields, "include", "colour", "chunking_strategy[type]", "chunking_strategy[x]"]

    async def scenario() -> None:
        rng = random.Random(5)
        seen = dict.fromkeys((200, 400, 404), 0)
        async with speech_app() as app:
            for _ in range(400):
                chosen = rng.sample(names, rng.choice([0, 1, 1, 2, 4]))
                fields = {name + rng.choice(["", "", "[]", "[a]"]): rng.choice(values) for name in chosen}
                response = await app.post(fields, rng.choice(TASKS))
                assert response.status_code in seen, (fields, response.text)
                seen[response.status_code] += 1
                assert response.status_code == 200 or len(error_of(response)["message"]) < 500
            assert app.manager.num_open == 0 and app.manager.num_admitted == 0
        assert seen[200] > 50 and seen[400] > 50, seen

    run_async(scenario())
