"""Prints the runtime requirements of pyproject.toml, for an editable install without dependency resolution."""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

if __name__ == "__main__":
    print(" ".join(f"{name.replace(' ', '')}" for name in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]))
