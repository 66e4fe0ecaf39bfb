"""tools/serve: each file is sound to the tool that will read it, and says only what `dspark serve` knows."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

pytest.importorskip("dspark_cpp._core")

from dspark_cpp.cli import app

FILES = Path(__file__).parents[1] / "tools" / "serve"


def test_options_are_those_of_the_command() -> None:
    known = {name for parameter in get_command(app).commands["serve"].params for name in parameter.opts}  # type: ignore[attr-defined]
    for path in FILES.iterdir():
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            if match := re.search(r"\bserve\b[\"',]* (.*)", line):
                used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", match[1]))
                assert used <= known | {"--build", "--detach"}, (path.name, line)


def test_every_file_says_how_it_is_used() -> None:
    for name in ("dspark.service", "dspark.plist", "Dockerfile", "compose.yaml", "nginx.conf"):
        comment = re.split(r"-->|\n\n(?![# ])", (FILES / name).read_text(encoding="utf-8"))[0]
        assert re.search(r"^#?  +(sudo|docker|dspark|launchctl) .*dspark", comment, re.MULTILINE), name


def test_launchd_reads_the_plist() -> None:
    found = plistlib.loads((FILES / "dspark.plist").read_bytes())
    assert found["Label"] == "dspark.serve"
    assert found["ProgramArguments"][1:] == ["serve"]


def test_compose_file_is_whole() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((FILES / "compose.yaml").read_text(encoding="utf-8"))
    assert (FILES / found["services"]["dspark"]["build"]["context"]).resolve() == FILES.parents[1]
    assert found["services"]["open-webui"]["environment"]["OLLAMA_BASE_URL"] == "http://dspark:11434"
    assert set(found["volumes"]) == {"models", "open-webui"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    text = (FILES / "dspark.service").read_text(encoding="utf-8")
    unit = tmp_path / "dspark.service"
    unit.write_text(text.replace("/opt/dspark/bin/dspark", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    mine = [line for line in done.stderr.splitlines() if "dspark.service" in line]
    assert mine == []
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_nginx_reads_its_file(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    text = (FILES / "nginx.conf").read_text(encoding="utf-8")
    text = text.replace("/etc/nginx/tls/llm.example.org.pem", str(certificate))
    text = text.replace("/etc/nginx/tls/llm.example.org.key", str(key))
    config = tmp_path / "nginx.conf"
    config.write_text(f"pid {tmp_path}/pid;\nerror_log {tmp_path}/log;\nevents {{}}\nhttp {{\n{text}\n}}\n")
    done = subprocess.run(["nginx", "-t", "-p", tmp_path, "-c", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
