"""Buffers that come back, waiting for them; queues drained, restarted, handed over, closed."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import numpy as np
import pytest

from guestpv.errors import UsageError
from ringpeer import bench, mask

from .kit import FORMATS, SPLIT, buffers, use_all


@pytest.mark.requirement("DRV-SPLIT-57", "DRV-PACKED-39")
@FORMATS
def test_in_order_batches_return_every_buffer_and_count_the_skipped_ones_as_full(base: int) -> None:
    b = bench(base | mask("IN_ORDER"), 8)
    read, write = buffers(b, 4)[0], buffers(b, 40)[0]
    tokens = [b.queue.add([read], [write]), b.queue.add([read]), b.queue.add([], [write])]
    b.queue.publish()
    chains = [b.peer.pop() for _ in tokens]
    assert all(chains)
    b.peer.push(chains[2], 3, batch=(chains[0], chains[1]))  # type: ignore[arg-type]
    assert b.queue.pending()
    assert list(b.queue.completions()) == list(zip(tokens, (40, 0, 3), strict=True))
    assert not b.queue.pending()
    assert b.queue.free_slots == 8


@FORMATS
def test_slots_freed_last_are_used_first(base: int) -> None:
    """So a large queue with few buffers in flight stays within few cache lines (and tables)."""
    b = bench(base, 1024)
    part = b.pool.allocate(4)
    seen = set()
    for _ in range(3000):
        seen.add(b.queue.add([part]) & 0xFFFF)
        b.queue.publish()
        use_all(b)
    assert seen == {0}


@FORMATS
def test_tokens_are_never_given_out_twice(base: int) -> None:
    b = bench(base, 2)
    part = b.pool.allocate(4)
    tokens = []
    for _ in range(100):
        tokens.append(b.queue.add([part]))
        b.queue.publish()
        use_all(b)
    assert len(set(tokens)) == 100


@pytest.mark.requirement("DRV-VQRESET-02", "DRV-PACKED-25")
@FORMATS
def test_drain_returns_what_never_came_back_and_starts_over(base: int) -> None:
    b = bench(base | mask("INDIRECT_DESC"), 8)
    part = b.pool.allocate(8)
    tokens = [b.queue.add([part], cookie=n) for n in range(5)]
    b.queue.publish()
    chains = [b.peer.pop() for _ in range(5)]
    assert chains[2] is not None
    b.peer.push(chains[2], 0)
    assert [token for token, _ in b.queue.completions()] == [tokens[2]]
    unpublished = b.queue.add([part], [part], cookie="never seen")
    assert b.queue.drain() == [tokens[0], tokens[1], tokens[3], tokens[4], unpublished]
    assert b.queue.cookie(unpublished) == "never seen"
    assert b.queue.outstanding == 0
    assert not b.queue.desc["flags"].any()
    assert not any(np.any(b.queue.driver[name]) for name in b.queue.driver.dtype.names)
    again = type(b.peer)(b.queue, b.space)
    token = b.queue.add([part])
    b.queue.publish()
    chain = again.pop()
    assert chain is not None
    again.push(chain, 0)
    assert list(b.queue.completions()) == [(token, 0)]


@pytest.mark.requirement("DRV-VQRESET-03")
@FORMATS
def test_restart_with_another_size_moves_the_rings(base: int) -> None:
    b = bench(base | mask("INDIRECT_DESC"), 8)
    part = b.pool.allocate(8)
    b.queue.add([part])
    with pytest.raises(UsageError, match="1 buffers are outstanding"):
        b.queue.restart(16)
    b.queue.drain()
    with pytest.raises(ValueError, match="queue size 0"):
        b.queue.restart(0)
    b.queue.restart(16)
    assert (b.queue.size, len(b.queue.desc), b.queue.free_slots) == (16, 16, 16)
    peer = type(b.peer)(b.queue, b.space)
    b.queue.add_burst(np.full((16, 1), part.address, np.uint64), np.full((16, 1), 8, np.uint32), 0)
    b.queue.publish()
    assert [peer.pop() is not None for _ in range(17)] == [True] * 16 + [False]


def test_close_gives_the_memory_back_and_later_calls_say_so() -> None:
    b = bench(mask("INDIRECT_DESC"), 8)
    b.queue.close()
    b.queue.close()
    assert b.pool.in_use == 0
    with pytest.raises(UsageError, match="closed"):
        b.queue.publish()


@FORMATS
def test_a_queue_belongs_to_one_thread_until_it_is_handed_over(base: int) -> None:
    b = bench(base, 8)
    part = b.pool.allocate(8)
    errors: list[str] = []

    def other() -> None:
        for operation in (
            lambda: b.queue.add([part]),
            b.queue.publish,
            b.queue.reap_burst,
            b.queue.pending,
            b.queue.disable_interrupts,
            b.queue.enable_interrupts,
            lambda: b.queue.wait(0),
        ):
            with pytest.raises(UsageError, match="another thread") as caught:
                operation()
            errors.append(str(caught.value))
        b.queue.own()
        b.queue.add([part])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 7
    with pytest.raises(UsageError, match=r"own\(\)"):
        b.queue.publish()
    b.queue.own()
    assert b.queue.publish()


@FORMATS
@pytest.mark.parametrize("extra", ["", "EVENT_IDX"])
def test_wait_sleeps_on_the_eventfd_and_loses_no_wakeup(base: int, extra: str) -> None:
    """A device thread that interrupts only when the rings say so, at every phase of the wait."""
    fd = os.eventfd(0)
    b = bench(base | mask(*filter(None, [extra])), 4, interrupt_fd=fd)
    assert b.queue.fileno() == fd
    part = b.pool.allocate(4)
    for n in range(60):
        token = b.queue.add([part])
        b.queue.publish()
        delay = n % 6 * 40e-6

        def device(delay: float = delay) -> None:
            time.sleep(delay)
            chain = b.peer.pop()
            assert chain is not None
            before = b.peer.interrupts
            b.peer.push(chain, 0)
            if b.peer.interrupts != before:
                os.eventfd_write(fd, 1)

        thread = threading.Thread(target=device)
        thread.start()
        assert b.queue.wait(60, spin_us=n % 3 * 50), "the wake-up was lost"
        thread.join()
        assert list(b.queue.completions()) == [(token, 0)]
        b.queue.disable_interrupts()
    os.close(fd)


def test_wait_without_an_interrupt_polls_and_ends_in_time() -> None:
    b = bench(SPLIT, 4)
    with pytest.raises(UsageError, match="no interrupt"):
        b.queue.fileno()
    begin = time.monotonic()
    assert not b.queue.wait(0.02)
    assert 0.02 <= time.monotonic() - begin < 60
    assert not b.queue.wait(0)


def test_wait_is_interrupted_by_signal_handlers_and_goes_on() -> None:
    import signal

    b = bench(SPLIT, 4, interrupt_fd=(fd := os.eventfd(0)))
    token = b.queue.add([b.pool.allocate(4)])
    b.queue.publish()
    seen: list[int] = []

    def handler(number: int, _frame: object) -> None:
        seen.append(number)
        if len(seen) == 3:
            chain = b.peer.pop()
            assert chain is not None
            b.peer.push(chain, 0)
            os.eventfd_write(fd, 1)

    old = signal.signal(signal.SIGUSR1, handler)
    over = threading.Event()

    def alarm() -> None:
        while not over.wait(0.01):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    thread = threading.Thread(target=alarm)
    try:
        thread.start()
        assert b.queue.wait(60, spin_us=0)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, old)
    assert len(seen) >= 3
    assert list(b.queue.completions()) == [(token, 0)]
    os.close(fd)


def test_interrupts_that_need_an_acknowledgement_get_one_each_time() -> None:
    acknowledged: list[int] = []
    fd = os.eventfd(0)
    b = bench(SPLIT, 4, interrupt_fd=fd, acknowledge=lambda: acknowledged.append(1))
    os.eventfd_write(fd, 1)
    assert not b.queue.wait(0.01)
    assert acknowledged == [1]
    os.eventfd_write(fd, 1)
    assert b.queue.clear_interrupt()
    assert not b.queue.clear_interrupt()
    assert acknowledged == [1, 1]
    os.close(fd)


@FORMATS
def test_a_generator_of_completions_left_early_loses_nothing(base: int) -> None:
    b = bench(base, 4)
    part = b.pool.allocate(4)
    tokens = [b.queue.add([part]) for _ in range(3)]
    b.queue.publish()
    while chain := b.peer.pop():
        b.peer.push(chain, 0)
    assert next(iter(b.queue.completions())) == (tokens[0], 0)
    assert list(b.queue.completions()) == [(tokens[1], 0), (tokens[2], 0)]


@FORMATS
@pytest.mark.parametrize("extra", ["", "EVENT_IDX"])
def test_asyncio_waits_on_the_queue(base: int, extra: str) -> None:
    fd = os.eventfd(0)
    b = bench(base | mask(*filter(None, [extra])), 4, interrupt_fd=fd)
    part = b.pool.allocate(4)

    async def drive() -> list[int]:
        loop = asyncio.get_running_loop()
        back: list[int] = []
        for turn in range(5):
            done = loop.create_future()

            def look(done: asyncio.Future[None] = done) -> None:
                b.queue.clear_interrupt()
                back.extend(token for token, _ in b.queue.completions())
                if not done.done():
                    done.set_result(None)

            def device() -> None:
                chain = b.peer.pop()
                assert chain is not None
                before = b.peer.interrupts
                b.peer.push(chain, 0)
                assert b.peer.interrupts > before, "the interrupt was lost"
                os.eventfd_write(fd, 1)

            b.queue.add([part])
            b.queue.publish()
            assert not b.queue.enable_interrupts()
            loop.add_reader(b.queue.fileno(), look)
            loop.call_later(0.001, device)
            await asyncio.wait_for(done, 20)
            loop.remove_reader(b.queue.fileno())
            assert len(back) == turn + 1
        return back

    assert len(set(asyncio.run(drive()))) == 5
    os.close(fd)
