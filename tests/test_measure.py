"""tools/measure.py: its commands are those of today's command line, and the page shows what they printed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from dspark_cpp.cli import app
from typer.testing import CliRunner

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", TOOLS / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module
    spec.loader.exec_module(module)
    return module


def test_every_command_is_known(measure: ModuleType) -> None:
    for step in measure.steps():
        for program, *arguments in step.commands:
            if program == "dspark":
                result = CliRunner().invoke(app, [*arguments, "--help"])  # an unknown option comes before the help
                assert result.exit_code == 0, result.output
            else:
                assert (TOOLS.parent / arguments[0]).exists()


def test_page_shows_what_was_printed(measure: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    print_it = [sys.executable, "-c", "print('noise'); print('the table'); print('1.25x')"]
    step = measure.Step("one", "A title", "A note.", [print_it], "the table")
    assert measure.section(step, {}) == ""
    measured = measure.run(step)
    (tmp_path / "one.json").write_text(json.dumps(asdict(measured)))
    section = measure.section(step, {})
    assert section.startswith("\n## A title\n\nA note. ")
    assert section.endswith("```\nthe table\n1.25x\n```\n")
    assert measured.machine in section
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n{section}\n## Another\n\n```\n1\n```\n")
    (tmp_path / "one.json").unlink()  # measured elsewhere: the page keeps it
    before = measure.sections_of(page)
    assert list(before) == ["A title", "Another"]
    assert measure.section(step, before).rstrip() == section.rstrip()


def test_failed_command_ends_it(measure: ModuleType) -> None:
    fail = [sys.executable, "-c", "import sys; sys.exit('no such file')"]
    with pytest.raises(SystemExit, match="no such file"):
        measure.run(measure.Step("one", "", "", [fail]))


def test_unknown_step_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS / "measure.py"), "--steps", "demo,none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--steps must be among demo" in done.stderr
    assert "got none" in done.stderr
