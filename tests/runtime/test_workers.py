"""Threads for work on sound, shared by requests."""

from __future__ import annotations

import asyncio
import threading

import pytest

from runtime.workers import Workers


def test_a_request_has_only_its_share_of_the_threads_and_the_loop_stays_free() -> None:
    async def scenario() -> None:
        workers = Workers(4)
        running, most, lock, gate = [0], [0], threading.Lock(), threading.Event()

        def work() -> int:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            gate.wait(5)
            with lock:
                running[0] -= 1
            return threading.get_ident()

        share = workers.share(2)
        tasks = [asyncio.create_task(share.run(work)) for _ in range(6)]
        while running[0] < 2:
            await asyncio.sleep(0.001)
        other = asyncio.create_task(workers.share(1).run(lambda: "somebody else"))
        assert await asyncio.wait_for(other, 5) == "somebody else"
        gate.set()
        idents = await asyncio.gather(*tasks)
        assert most[0] == 2
        assert threading.get_ident() not in idents
        workers.close()

    asyncio.run(scenario())


def test_errors_are_the_callers_and_cancelled_work_that_waits_never_begins() -> None:
    async def scenario() -> None:
        workers = Workers(1)
        share = workers.share(2)
        with pytest.raises(ZeroDivisionError):
            await share.run(lambda: 1 // 0)
        gate, begun = threading.Event(), []
        first = asyncio.create_task(share.run(lambda: gate.wait(5)))
        second = asyncio.create_task(share.run(lambda: begun.append(2)))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.set()
        assert await first
        assert begun == []
        workers.close()

    asyncio.run(scenario())
