"""store_cli: the commands as a user runs them, and what they print, line by line as Ollama does."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
from hub_stand_in import serve_hub
from rich.console import Console

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import cli
from dspark_cpp.errors import PullError
from dspark_cpp.server_client import server_url
from dspark_cpp.store import Store
from dspark_cpp.store_progress import follow
from dspark_cpp.store_show import describe_age, describe_processor, format_bytes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dspark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command on a store of its own; returns its status, output and errors."""
    monkeypatch.setenv("DSPARK_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dspark", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        return (ending.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]

    return run


def test_create_list_show_copy_remove(dspark: Run, demo_target: Path, demo_drafter: Path) -> None:
    made = dspark("create", "mine", "--target", demo_target, "--draft", demo_drafter, "--system", "Be brief.")
    assert made == (0, "", "writing manifest\nsuccess\n")
    status, output, _ = dspark("list")
    assert status == 0
    head, row = output.splitlines()
    assert head.split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert re.fullmatch(r"mine:latest    [0-9a-f]{12}    11 MB    Less than a minute ago", row)
    status, output, _ = dspark("show", "mine")
    assert output.startswith("  Model\n    architecture        qwen3\n    parameters          8.40M\n")
    assert "  Drafter\n    parameters         1.64M\n    block size         7\n" in output
    assert "  Capabilities\n    completion\n" in output
    assert "  System\n    Be brief.\n" in output
    assert dspark("cp", "mine", "me/other:v2") == (0, "copied 'mine' to 'me/other:v2'\n", "")
    assert len(dspark("ls", "me/")[1].splitlines()) == 2
    assert dspark("rm", "mine", "me/other:v2") == (0, "deleted 'mine'\ndeleted 'me/other:v2'\n", "")
    assert dspark("list")[1] == "NAME    ID    SIZE    MODIFIED\n"
    assert demo_target.exists()


def test_create_by_modelfile_finds_files_beside_it(dspark: Run, tmp_path: Path, demo_target: Path) -> None:
    folder = tmp_path / "recipe"
    folder.mkdir()
    shutil.copy(demo_target, folder / "t.gguf")
    (folder / "Modelfile").write_text('FROM t.gguf\nPARAMETER stop "a b"\nPARAMETER top_k 3\nTEMPLATE x\n')
    status, _, errors = dspark("create", "mine", "-f", folder / "Modelfile")
    assert status == 0
    assert errors.startswith("warning: TEMPLATE is kept but not used")
    assert dspark("show", "--parameters", "mine")[1].split() == ["stop", '"a', 'b"', "top_k", "3"]
    assert f"FROM {folder / 't.gguf'}\n" in dspark("show", "--modelfile", "mine")[1]
    (tmp_path / "Modelfile").write_text("FROM mine\nSYSTEM hello\n")
    assert dspark("create", "child")[0] == 0
    assert dspark("show", "child", "--system") == (0, "hello\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nope"), "model 'nope' not found"),
        (("rm", "nope"), "model 'nope' not found"),
        (("cp", "nope", "x"), "model 'nope' not found"),
        (("run", "nope", "hi"), "model 'nope' not found"),
        (("show", "../../etc/passwd"), "must"),
        (("create", "x", "--target", "gone.gguf"), "no such file"),
        (("create", "x"), "No such file or directory: 'Modelfile'"),
        (("create", "x", "--target", "a", "-f", "b"), "only one of --target and --file must be given"),
        (("pull", "llama3"), "must be a repository of the hub"),
        (("show", "x", "--system", "--license"), "only one of"),
    ],
)
def test_mistakes_are_told_in_one_line(dspark: Run, arguments: tuple[str, ...], message: str) -> None:
    status, _, errors = dspark(*arguments)
    assert status == 1
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_pull_then_run_by_name(
    dspark: Run, tmp_path: Path, demo_target: Path, demo_drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "hub" / "me" / "tiny"
    repo.mkdir(parents=True)
    shutil.copy(demo_target, repo / "tiny-Q8_0.gguf")
    shutil.copy(demo_drafter, repo / "tiny-dspark.gguf")
    with serve_hub(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        status, output, errors = dspark("pull", "hf.co/me/tiny:Q8_0")
    assert (status, output) == (0, "")
    steps = errors.splitlines()
    assert steps[0] == "pulling manifest"
    assert steps[-1] == "success"
    assert [step.split()[0] for step in steps[1:-2]] == ["pulling", "verifying", "pulling", "verifying"]
    asked = ("What is a whale?", "--n-threads", "1", "-t", "0", "-n", "8")
    by_name = dspark("run", "me/tiny:q8_0", *asked, "--stats")
    by_file = dspark("run", demo_target, *asked)
    assert by_name[:2] == by_file[:2]
    assert "drafted" in by_name[2]


def test_run_takes_the_options_of_the_model(dspark: Run, demo_target: Path, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(
        f"FROM {demo_target}\nPARAMETER temperature 0\nPARAMETER num_predict 3\nPARAMETER mirostat 1\nSYSTEM Be brief."
    )
    dspark("create", "short")
    question = "What is a whale?"
    status, three, errors = dspark("run", "short", question, "--n-threads", "1")
    assert status == 0
    assert "warning: parameters of short:latest that are not used: mirostat" in errors
    plain = ("--n-threads", "1", "-t", "0", "--system", "Be brief.")
    assert three == dspark("run", demo_target, question, "-n", "3", *plain)[1]
    nine = dspark("run", "short", question, "-n", "9", "--n-threads", "1")[1]
    assert nine == dspark("run", demo_target, question, "-n", "9", *plain)[1]
    assert nine != three


def test_run_tells_that_a_file_was_changed(dspark: Run, tmp_path: Path, demo_target: Path) -> None:
    shutil.copy(demo_target, tmp_path / "t.gguf")
    dspark("create", "mine", "--target", "t.gguf")
    os.truncate(tmp_path / "t.gguf", 1000)
    status, _, errors = dspark("run", "mine", "hi")
    assert status == 1
    assert "must have 9007072 bytes, got 1000: it is damaged; create the model again" in errors


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, object]]]:
    """A server that has one model loaded and records what it is asked."""
    asked: list[tuple[str, str, object]] = []
    loaded = {
        "name": "mine:latest",
        "digest": "sha256:" + "ab" * 32,
        "size": 4_400_000_000,
        "size_vram": 0,
        "context_length": 4096,
        "expires_at": (datetime.now(UTC) + timedelta(minutes=4, seconds=30)).isoformat(),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self.answer(200, {"models": [loaded]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            known = body["model"] == "mine"
            self.answer(200 if known else 404, {"done": True} if known else {"error": "model 'x' not found"})

        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body).encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{running.server_port}")
        yield asked
        running.shutdown()


def test_ps_and_stop_ask_the_server(dspark: Run, server: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_API_KEY", "secret")
    status, output, _ = dspark("ps")
    head, row = output.splitlines()
    assert status == 0
    assert head.split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
    assert row == "mine:latest    abababababab    4.4 GB    100% CPU     4096       4 minutes from now"
    assert dspark("stop", "mine") == (0, "", "")
    assert server == [("/api/generate", "Bearer secret", {"model": "mine", "keep_alive": 0})]
    assert dspark("stop", "x") == (1, "", "error: model 'x' not found\n")


def test_ps_without_server_says_so(dspark: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    status, _, errors = dspark("ps")
    assert status == 1
    assert errors.startswith("error: cannot reach the server at http://127.0.0.1:9: ")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":5000", "http://127.0.0.1:5000"),
        ("0.0.0.0:80", "http://127.0.0.1:80"),
        ("http://host", "http://host:80"),
        ("https://host/ollama/", "https://host:443/ollama"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("::1", "http://[::1]:11434"),
        ('"host:1"', "http://host:1"),
    ],
)
def test_server_address_is_read_as_ollama_does(monkeypatch: pytest.MonkeyPatch, text: str, url: str) -> None:
    monkeypatch.setenv("OLLAMA_HOST", text)
    assert server_url() == url


@pytest.mark.parametrize("text", ["ftp://host", "host:99999", "host:x"])
def test_server_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OLLAMA_HOST", text)
    with pytest.raises(ValueError, match="OLLAMA_HOST must"):
        server_url()


def test_progress_draws_a_bar_for_each_file_on_a_terminal() -> None:
    def records() -> Iterator[dict[str, object]]:
        yield {"status": "pulling manifest"}
        for n in (0, 500_000, 1_000_000):
            yield {"status": "pulling 0123", "digest": "sha256:0123", "total": 1_000_000, "completed": n}
        yield {"status": "success"}
        return 7

    screen = StringIO()
    assert follow(records(), Console(file=screen, force_terminal=True, width=100)) == 7  # type: ignore[arg-type]
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "pulling manifest" in shown
    assert re.search(r"pulling 0123:.* 100%.*1\.0/1\.0 MB", shown)
    assert "success" in shown


def test_progress_lets_errors_through() -> None:
    def records() -> Iterator[dict[str, object]]:
        yield {"status": "pulling manifest"}
        raise PullError("gone")

    with pytest.raises(PullError, match="gone"):
        follow(records(), Console(file=StringIO()))  # type: ignore[arg-type]


def test_units_are_ollamas() -> None:
    sizes = [format_bytes(n) for n in (999, 1000, 1536, 11_065_056, 2_019_393_189, 10**12)]
    assert sizes == ["999 B", "1 KB", "1.5 KB", "11 MB", "2.0 GB", "1 TB"]
    now = datetime(2026, 1, 31, tzinfo=UTC)
    ages = [describe_age(now - timedelta(hours=hours), now) for hours in (0, 1, 50, 200, -1.5)]
    assert ages == ["Less than a minute ago", "1 hour ago", "2 days ago", "1 week ago", "1 hour from now"]
    assert [describe_processor(100, n) for n in (0, 100, 25)] == ["100% CPU", "100% GPU", "75%/25% CPU/GPU"]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, dspark_cpp.cli; print([m for m in ('numpy', 'gguf', 'huggingface_hub') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSPARK_MODELS", str(tmp_path / "here"))
    assert Store().root == tmp_path / "here"
    monkeypatch.setenv("DSPARK_MODELS", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store().root == tmp_path / ".dspark" / "models"
