"""engine_loop: one thread for many callers, and every way it can end."""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import LLM, DSparkError, EngineClosedError, QueueFullError, SamplingParams
from dspark_cpp.compute_thread import ComputeThread, compute_thread
from dspark_cpp.engine_loop import EngineLoop, RequestGroup
from waiting import LIMIT_S, wait_until

ENDLESS = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


# ---- the loop ----


class ScriptedEngine:
    """An engine whose steps are written down: lists of events, or an error."""

    def __init__(self, *steps):
        self.steps, self.cancelled, self.is_closed, self.n_requests = list(steps), [], False, 0

    @property
    def has_work(self):
        return self.n_requests > 0 and bool(self.steps)

    def submit(self, prompt, options):
        self.n_requests += 1
        return self.n_requests

    def turn(self, budget_ms):
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        return True

    def close(self):
        self.is_closed = True


def event(request_id, finish_reason=None):
    return SimpleNamespace(request_id=request_id, finish_reason=finish_reason)


@pytest.mark.parametrize(
    ("error", "message"),
    [(QueueFullError("odd"), "^odd$"), (RuntimeError("boom"), "cannot run the engine: RuntimeError: boom")],
)
def test_loop_hands_an_engine_error_to_everyone(error, message):
    engine = ScriptedEngine()
    loop = EngineLoop(engine)
    with RequestGroup(loop) as one, RequestGroup(loop) as other:
        one.submit([1], None)
        other.submit([1], None)
        with compute_thread.wake:
            engine.steps.append(error)
            compute_thread.wake.notify_all()
        for group in (one, other):
            with pytest.raises(DSparkError, match=message):
                group.next_event()
        with pytest.raises(EngineClosedError, match="the engine failed"):
            one.submit([1], None)
    assert engine.is_closed
    assert loop.is_closed
    loop.close()


def test_loop_gives_each_request_its_own_events():
    engine = ScriptedEngine([event(2), event(1)], [event(1, "stop"), event(2, "length")])
    loop = EngineLoop(engine)
    got: queue.Queue[tuple[str, object]] = queue.Queue()
    with compute_thread.wake:  # both before the first step
        loop.submit([1], None, lambda e: got.put(("a", e.finish_reason)))
        loop.submit([1], None, lambda e: got.put(("b", e.finish_reason)))
    assert [got.get(timeout=LIMIT_S) for _ in range(4)] == [("b", None), ("a", None), ("a", "stop"), ("b", "length")]
    loop.close()


def test_loop_survives_a_receiver_that_raises(caplog):
    engine = ScriptedEngine([event(1)], [event(1, "cancelled")])
    loop = EngineLoop(engine)
    loop.submit([1], None, lambda e: 1 / 0)
    wait_until(lambda: not engine.steps)
    wait_until(lambda: engine.cancelled == [1])
    assert "its receiver raised" in caplog.text
    loop.close()


def test_group_cancels_what_is_left_open():
    engine = ScriptedEngine()
    loop = EngineLoop(engine)
    with RequestGroup(loop) as group:
        ids = {group.submit([1], None) for _ in range(3)}
        assert group.n_open == 3
    assert set(engine.cancelled) == ids
    loop.close()
    loop.close()


# ---- the compute thread ----


def test_engines_of_a_process_take_turns_in_one_thread():
    order: list[tuple[str, str]] = []

    class Told(ScriptedEngine):
        def __init__(self, name):
            super().__init__([], [], [event(1, "stop")])
            self.name = name

        def turn(self, budget_ms):
            order.append((self.name, threading.current_thread().name))
            return super().turn(budget_ms)

    loops = [EngineLoop(Told(name)) for name in "ab"]
    groups = [RequestGroup(loop) for loop in loops]
    with compute_thread.wake:  # both before the first step
        for group in groups:
            group.submit([1], None)
    for group in groups:
        assert group.next_event().finish_reason == "stop"
    assert order == [(name, "dspark-compute") for name in "ababab"]
    for loop in loops:
        loop.close()


def test_jobs_run_between_turns_and_hand_back_what_they_did():
    thread = ComputeThread()
    assert thread.run(lambda: threading.current_thread().name) == "dspark-compute"
    assert thread.run(lambda: thread.run(lambda: thread.is_current))
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        thread.run(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    wait_until(lambda: thread._thread is None)  # nobody left: the thread has ended
    assert thread.run(lambda: 7) == 7


def test_a_collector_that_closes_with_the_lock_held_does_not_hang():
    loop = EngineLoop(ScriptedEngine())
    with compute_thread.wake:
        loop.close(wait=False)
    loop.close()
    assert loop.is_closed


# ---- endings ----


def test_close_reaches_those_who_wait(f32_target, f32_drafter):
    llm = LLM(f32_target, f32_drafter, n_ctx=4096, n_parallel=2, n_threads=1)
    errors: queue.Queue[BaseException] = queue.Queue()

    def ask() -> None:
        try:
            llm.generate(["One"] * 3, ENDLESS)
        except DSparkError as error:
            errors.put(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: llm._loop._engine.n_running == 2)
    llm.close()
    for thread in threads:
        thread.join(LIMIT_S)
    assert [type(errors.get_nowait()) for _ in threads] == [EngineClosedError] * 2


def test_use_after_close_is_refused(f32_target):
    with LLM(f32_target, n_ctx=128, n_threads=1) as llm:
        assert not llm.closed
    llm.close()
    assert llm.closed
    for call in (lambda: llm.generate("One"), lambda: next(llm.stream("One"))):
        with pytest.raises(EngineClosedError, match="the engine is closed"):
            call()
    assert llm.tokenize("still here")


def test_llm_that_is_dropped_ends_its_loop(f32_target):
    llm = LLM(f32_target, n_ctx=128, n_threads=1)
    loop = llm.loop
    assert not loop.is_closed
    del llm
    gc.collect()
    wait_until(lambda: loop not in compute_thread._members)
    assert loop.is_closed
    loop.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_is_told(llm):
    child = os.fork()
    if child == 0:
        try:
            llm.generate("One", SHORT)
        except EngineClosedError as error:
            os._exit(0 if "fork" in str(error) else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert llm.generate("One", SHORT)


def run_script(script: str, *arguments: object, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


INTERRUPTED = """
import signal, sys, threading, time
from dspark_cpp import LLM, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
llm = LLM(sys.argv[1], sys.argv[2], n_ctx=4096, n_threads=1)
endless = SamplingParams(temperature=0, max_tokens=100000, ignore_eos=True)
call = {"generate": lambda: llm.generate("One", endless), "stream": lambda: list(llm.stream("One", endless))}
def tell():
    while llm.engine.n_running == 0:
        time.sleep(0.001)
    print("running", flush=True)
threading.Thread(target=tell, daemon=True).start()
try:
    while True:
        call[sys.argv[3]]()
except KeyboardInterrupt:
    [one] = llm.generate("Two", SamplingParams(max_tokens=3, ignore_eos=True))
    print("interrupted", len(one.token_ids))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process there")
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ctrl_c_ends_a_call_and_leaves_the_llm_usable(f32_target, f32_drafter, call):
    process = run_script(INTERRUPTED, f32_target, f32_drafter, call)
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    try:
        output, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert (output, process.returncode) == ("interrupted 3\n", 0), errors


LEFT_OPEN = """
import sys, threading, time
from dspark_cpp import LLM, SamplingParams
llm = LLM(sys.argv[1], sys.argv[2], n_ctx=4096, n_threads=1)
endless = SamplingParams(temperature=0, max_tokens=100000, ignore_eos=True)
def ask():
    try:
        while True:
            llm.generate("One", endless)
    except Exception:
        pass
if sys.argv[3] == "busy":
    threading.Thread(target=ask, daemon=True).start()
    while llm.engine.n_running == 0:
        time.sleep(0.001)
print("leaving", flush=True)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_interpreter_ends_while_an_llm_is_open(f32_target, f32_drafter, state):
    process = run_script(LEFT_OPEN, f32_target, f32_drafter, state)
    output, errors = process.communicate(timeout=LIMIT_S)
    assert (output, errors, process.returncode) == ("leaving\n", "", 0)
