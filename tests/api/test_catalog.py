"""Models, health, readiness, the root, metrics."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import model_manager
from config import Settings
from tests.api import scripted
from tests.api.conftest import MakeHarness, opened, run_async
from tests.api.scripted import says
from tests.api.test_chat import HELLO, post


def test_models_are_listed_and_found_by_names_with_slashes(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            listed = (await h.client.get("/v1/models")).json()
            assert listed["object"] == "list" and len(listed["data"]) == 1
            entry = listed["data"][0]
            assert entry["id"] == "org/tiny" and entry["object"] == "model" and isinstance(entry["created"], int)
            assert entry["owned_by"] and entry["max_model_len"] == 512 and entry["lane"] == "solo"
            assert entry["kv_layout"] == (await h.client.get("/health")).json()["kv_layout"] == "slots"
            assert entry["generation_defaults"] == {"temperature": 0.6}
            assert entry["family"] == "decoder" and not {"languages", "placement"} & set(entry)
            assert (await h.client.get("/health")).json()["family"] == "decoder"
            for name in ("org/tiny", "org%2Ftiny", "model"):
                assert (await h.client.get(f"/models/{name}")).json() == entry

    run_async(scenario())


def test_a_model_that_is_spread_says_where_its_weights_are(engine: scripted.ScriptedEngine, tokenizer: Any) -> None:
    async def scenario() -> None:
        settings, places = Settings(hf_model="org/tiny", device_map="auto"), {"cuda:0": 5, "cpu": 3}
        load = scripted.stack(engine, tokenizer, placement=places)
        async with opened(settings, model_manager.ModelManager(settings, load)) as (_, client):
            assert (await client.get("/health")).json()["placement"] == places
            assert (await client.get("/v1/models")).json()["data"][0]["placement"] == places

    run_async(scenario())


def test_an_alias_replaces_the_name(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(served_model_name="mine") as h:
            assert (await h.client.get("/v1/models")).json()["data"][0]["id"] == "mine"
            assert (await post(h, {**HELLO, "model": "mine"})).json()["model"] == "mine"
            assert (await post(h, {**HELLO, "model": "org/tiny"})).status_code == 404

    run_async(scenario())


@pytest.mark.parametrize("path", ["/models", "/health", "/ready", "/", "/metrics"])
def test_every_route_is_there_with_and_without_the_version(harness: MakeHarness, path: str) -> None:
    async def scenario() -> None:
        async with harness() as h:
            for prefix in ("", "/v1"):
                assert (await h.client.get(prefix + path)).status_code == 200
            for route in ("/chat/completions", "/completions"):
                assert (await post(h, {**HELLO, "prompt": "a"}, route)).status_code == 200

    run_async(scenario())


def test_the_root_says_what_this_is(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            body = (await h.client.get("/")).json()
            assert body["name"] and body["version"] and body["model"] == "org/tiny"
            assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= set(body["endpoints"])

    run_async(scenario())


def test_a_server_that_loads_is_healthy_but_not_ready(harness: MakeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    may_load = threading.Event()

    def slow_stack(*arguments: Any) -> Any:
        load = scripted.stack(*arguments)
        return lambda *more: (may_load.wait(10), load(*more))[1]

    monkeypatch.setattr("tests.api.conftest.stack", slow_stack)

    async def scenario() -> None:
        async with harness(is_loaded=False) as h:
            assert (await h.client.get("/health")).json()["status"] == "loading"
            response = await h.client.get("/ready")
            assert (response.status_code, response.json()["status"]) == (503, "loading")
            for request in (post(h, HELLO), h.client.get("/v1/models")):
                response = await request
                assert response.status_code == 503 and response.headers["retry-after"]
            assert (await h.client.get("/metrics")).status_code == 200
            assert (await h.client.get("/")).json()["status"] == "loading"
            may_load.set()
            await h.manager.wait_until_loaded()
            response = await h.client.get("/ready")
            assert (response.status_code, response.json()["status"]) == (200, "ready")
            assert (await h.client.get("/health")).json()["lane"] == "solo"

    try:
        run_async(scenario())
    finally:
        may_load.set()


def test_health_and_metrics_show_what_is_compiled_and_captured(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness(torch_compile=True) as h:
            await post(h, HELLO)
            health = (await h.client.get("/health")).json()
            assert (health["compiled_batch_sizes"], health["graph_batch_sizes"]) == ([1, 4], [8])
            metrics = (await h.client.get("/metrics")).text
            assert "transformers_openai:num_compiled_batch_sizes 2.0" in metrics
            assert health["compiled_encoder_batch_sizes"] == [1]
            assert "transformers_openai:num_compiled_encoder_batch_sizes 1.0" in metrics
            assert "transformers_openai:num_graph_batch_sizes 1.0" in metrics
        async with harness() as h:
            assert "compiled_batch_sizes" not in (await h.client.get("/health")).json()

    run_async(scenario())


def test_draining_is_healthy_but_not_ready(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            await h.manager.drain(0)
            assert (await h.client.get("/health")).status_code == 200
            assert (await h.client.get("/ready")).status_code == 503

    run_async(scenario())


def test_an_engine_that_hangs_in_a_step_is_not_healthy(harness: MakeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_manager, "STALLED_AFTER_S", 0.1)

    async def scenario() -> None:
        async with harness() as h:
            h.engine.step_s = 0.5
            asking = asyncio.create_task(post(h, {**HELLO, "max_tokens": 1}))
            await asyncio.sleep(0.3)
            response = await h.client.get("/health")
            assert (response.status_code, response.json()["status"]) == (503, "stalled")
            await asking
            assert (await h.client.get("/health")).status_code == 200

    run_async(scenario())


def test_metrics_count_what_happened(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            h.engine.script = says([65] * 9, None)
            h.engine.step_s = 0.002
            body = (await post(h, {**HELLO, "n": 2, "max_tokens": 5})).json()
            await post(h, {**HELLO, "stream": True, "stop": "zz"})
            response = await h.client.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain; version=")
            samples = {
                (s.name.removeprefix("transformers_openai:"), *sorted(s.labels.items())): s.value
                for family in text_string_to_metric_families(response.text)
                for s in family.samples
            }
            num_prompt = body["usage"]["prompt_tokens"]
            assert samples["prompt_tokens_total",] == 3 * num_prompt
            assert samples["generation_tokens_total",] == 5 + 5 + 9
            assert samples["request_success_total", ("finished_reason", "length")] == 3
            assert samples["request_success_total", ("finished_reason", "stop")] == 0
            for name in (
                "time_to_first_token_seconds",
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prefill_time_seconds",
                "request_decode_time_seconds",
            ):
                assert samples[f"{name}_count",] == 3
            # The first output of a choice may hold more than one token, when the machine is busy.
            assert 1 <= samples["inter_token_latency_seconds_count",] <= 4 + 4 + 8
            assert samples["inter_token_latency_seconds_bucket", ("le", "+Inf")] <= 4 + 4 + 8
            assert samples["num_requests_waiting",] == 3 and samples["num_requests_running",] == 0
            assert samples["kv_cache_usage_ratio",] == 0.25
            assert samples["prefix_cache_queries_total",] == 20 and samples["prefix_cache_hits_total",] == 5
            assert samples["iteration_tokens_total_sum",] == 19
            assert samples["iteration_tokens_total_count",] == h.engine.num_steps

    run_async(scenario())


def test_two_apps_in_a_process_count_for_themselves(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as one, harness() as two:
            await post(one, HELLO)
            texts = [(await h.client.get("/metrics")).text for h in (one, two)]
            assert ["openai:e2e_request_latency_seconds_count 1.0" in text for text in texts] == [True, False]

    run_async(scenario())
