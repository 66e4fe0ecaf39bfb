"""cli: answers and the chat as a user runs them, in a process of their own; the rest in this one, which is faster."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import build_info, cli


def dspark(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dspark_cpp.cli", *map(str, arguments)]
    # On a busy machine threads that spin while they wait for each other take the time of those they wait for.
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8", "OMP_WAIT_POLICY": "passive"}
    given = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    if arguments[0] == "run":
        command += ["--n-threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **given)


@pytest.fixture
def dspark_here(monkeypatch, capsys):
    """Run a command in this process; returns its status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dspark", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        return (ending.value.code or 0, *capsys.readouterr())

    return run


def test_run_answers_one_question(demo_target, demo_drafter, questions):
    result = dspark("run", demo_target, "-d", demo_drafter, questions[0], "-n", 24, "-t", 0)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    again = dspark("run", "demo", questions[0], "-n", 24, "-t", 0, "--policy", "off")
    assert len(again.stdout) > 10
    assert result.stdout == again.stdout  # the pair by name, and without speculation


def test_run_reads_standard_input_and_stops_before_a_stop_string(questions):
    whole = dspark("run", "demo", "-n", 24, "-t", 0, text=questions[0]).stdout
    stop = whole[8:11]
    cut = dspark("run", "demo", questions[0], "-n", 24, "-t", 0, "--stop", stop).stdout
    assert cut == whole[: whole.index(stop)] + "\n"


def test_run_shows_the_figures_of_speculation():
    result = dspark("run", "demo", "Once", "--raw", "-n", 24, "--seed", 1, "--stats")
    assert result.returncode == 0
    assert re.search(r"\d+ rounds of \d+\.\d+ tokens; drafted \d+, verified \d+, accepted \d+", result.stderr)


def test_run_repeats_itself_with_a_seed():
    first, again = (dspark("run", "demo", "Once", "--raw", "-n", 16, "--seed", 5).stdout for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("run", "no/such/file.gguf", "hello"), "no/such/file.gguf"),
        (("run", os.devnull, "hello"), os.devnull),
        (("run", "demo", "hello", "--top-p", "3"), "top_p must be at most 1, got 3.0"),
        (("run", "demo", "hello", "--temperature", "nan"), "temperature must be finite, got nan"),
        (("run", "demo", "hello", "--policy", "always"), "policy must be off, full, fixed:n"),
        (("run", "demo", "hello", "--head", "none"), "head must be one of"),
        (("run", "demo", "hello", "--n-ctx", "4"), "n_ctx = 4"),
        (("run", "demo", "", "--raw"), "prompt must"),
        (("inspect", "no/such/file.gguf"), "no/such/file.gguf"),
        (("demo", "--n-repeats", "0"), "n_repeats must be at least 1, got 0"),
    ],
)
def test_errors_are_one_line(dspark_here, arguments, part):
    status, output, errors = dspark_here(*arguments)
    assert (status, output) == (1, "")
    assert re.fullmatch(r"error: .+\n", errors)
    assert part in errors


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "demo", "x", "--bogus"), ("nothing",), ("run", "demo", "x", "-n", "a")]
)
def test_wrong_usage_is_status_2(dspark_here, arguments):
    status, output, errors = dspark_here(*arguments)
    assert (status, output) == (2, "")
    assert "Usage" in errors


@pytest.mark.parametrize("command", [(), ("run",), ("info",), ("demo",), ("inspect",)])
def test_help_of_every_command(dspark_here, command):
    status, output, errors = dspark_here(*command, "--help")
    assert (status, errors) == (0, "")
    assert "Usage" in output


def test_inspect_is_mounted(dspark_here, demo_drafter, demo_target):
    status, output, errors = dspark_here("inspect", demo_drafter, "--target", demo_target)
    assert (status, errors) == (0, "")
    assert "dflash" in output


def test_info_says_what_this_is(dspark_here):
    status, output, errors = dspark_here("info")
    build = build_info()
    assert status == 0
    for part in (build.version, build.llama_cpp_commit, "CPU"):
        assert part in output
    assert ("WARNING" in errors) == bool(set(build.requested_backends) - set(build.backends))


def test_info_warns_of_a_backend_that_is_missing(monkeypatch, capsys):
    class Build:
        requested_backends = ("CPU", "CUDA", "RPC")
        backends = ("CPU", "rpc")

    cli._warn_of_missing_backends(Build())
    assert "asked for when this was built, but not in it: CUDA\n" in capsys.readouterr().err


def test_demo_compares_both_ways_of_decoding():
    result = dspark("demo", "--n-repeats", 1, "--max-tokens", 12)
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("arithmetic", "code", "chat", "Temperature 0", "Temperature 1", "accepted", "of plain decoding"):
        assert part in result.stdout
    assert re.search(r"speculation off and on: \d+ of \d+ identical", result.stdout)
    assert "\x1b" not in result.stdout  # no colours where nobody asked for them


def test_demo_asks_what_the_pair_was_not_trained_on(questions):
    held_out = json.loads((Path(__file__).parent / "data" / "demo_pair" / "prompts.json").read_text("utf-8"))["prompts"]
    assert set(questions) <= {prompt["messages"][-1]["content"] for prompt in held_out}


# ---- the chat in the terminal ----


class Terminal:
    """`dspark run demo` on a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self._unread = ""
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "dspark_cpp.cli", "run", "demo", "--n-threads", "1", *map(str, arguments)]
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(2)

    def read_until(self, text: str, seconds: float = 300) -> str:
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            assert time.monotonic() < deadline, self._unread
            if select.select([self._ours], [], [], 0.1)[0]:
                self._unread += os.read(self._ours, 4096).decode("utf-8", "replace")
        shown, _, self._unread = self._unread.partition(text)
        return shown

    def read_any(self) -> None:
        """Wait for output, and leave it to be read."""
        while not self._unread.strip():
            self._unread += os.read(self._ours, 4096).decode("utf-8", "replace")

    def wait(self) -> int:
        status = self._process.wait(300)
        os.close(self._ours)
        return status


def test_chat_answers_until_told_to_leave(questions):
    terminal = Terminal("-n", 8, "-t", 0, "--stats")
    terminal.read_until(">>> ")
    for _ in range(2):
        terminal.type(f"{questions[0]}\n")
        shown = terminal.read_until("]\r\n>>> ")
        assert "rounds of" in shown
    terminal.type("/clear\n")
    terminal.read_until(">>> ")
    terminal.type("/exit\n")
    assert terminal.wait() == 0


def test_chat_leaves_at_the_end_of_input():
    terminal = Terminal()
    terminal.read_until(">>> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_chat_ctrl_c_stops_the_answer_only():
    # It repeats itself to the end of the context: more than a terminal that nobody reads holds.
    terminal = Terminal("-t", 0, "--repetition-penalty", 0.01, "--raw", "--n-ctx", 4000)
    terminal.read_until(">>> ")
    terminal.type("One\n")
    terminal.read_until("One")
    terminal.read_any()  # the answer has begun: before it, Ctrl-C would be an answer to the question's line
    terminal.interrupt()
    terminal.read_until(">>> ")
    terminal.type("/exit\n")
    assert terminal.wait() == 0


def test_chat_goes_on_after_an_error():
    terminal = Terminal("--n-ctx", 64, "-n", 4)
    terminal.read_until(">>> ")
    terminal.type("word " * 200 + "\n")
    terminal.read_until("error: ")
    terminal.read_until(">>> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
