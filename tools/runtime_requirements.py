"""Prints the runtime requirements of pyproject.toml, for an editable install without dependency resolution."""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

if __name__ == "__main__":
    requirements = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    print(" ".join(requirement.replace(" ", "") for requirement in requirements))
