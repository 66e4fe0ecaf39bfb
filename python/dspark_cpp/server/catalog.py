"""Which models there are: those of the command line and those of the store, under one kind of entry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dspark_cpp.errors import ModelNotFoundError
from dspark_cpp.server.problems import Problem
from dspark_cpp.server.settings import StaticModel
from dspark_cpp.store import Manifest, ModelName, Store, render_modelfile
from dspark_cpp.store.model_files import describe, list_capabilities

__all__ = ["Catalog", "Entry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model that can be asked for.

    Attributes
    ----------
    name
        With its tag.
    template
        A Jinja template in place of the file's.
    digest
        64 hexadecimal digits: other files or options, other digest.
    manifest
        None for a model of the command line.
    """

    name: str
    target: Path
    draft: Path | None
    digest: str
    size: int
    modified_at: datetime
    details: Mapping[str, Any]
    capabilities: Sequence[str]
    template: str | None = None
    system: str = ""
    license: str = ""
    parameters: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]] = ()
    manifest: Manifest | None = None

    @property
    def modelfile(self) -> str:
        """The Modelfile that would make it."""
        if self.manifest is not None:
            return render_modelfile(self.manifest)
        return f"FROM {self.target}\n" + (f"DRAFT {self.draft}\n" if self.draft else "")


class Catalog:
    """Finds models by name.

    Parameters
    ----------
    models
        Models of the command line.
    store
        The store; None: there is none.
    """

    def __init__(self, models: Sequence[StaticModel], store: Store | None) -> None:
        self.store = store
        self._static = {ModelName.parse(model.name).key: _static_entry(model) for model in models}

    def get(self, name: str) -> Entry:
        """Return the model of this name.

        Raises
        ------
        Problem
            404 if there is none, 400 if this cannot be a name.
        """
        try:
            entry = self._static.get(ModelName.parse(name).key)
            if entry is not None:
                return entry
            if self.store is None:
                raise ModelNotFoundError
            return _store_entry(self.store.get(name))
        except ModelNotFoundError:
            raise Problem(404, f"model '{name}' not found", code="model_not_found", param="model") from None

    def is_static(self, name: str) -> bool:
        """Whether the name was given on the command line: it cannot be changed then."""
        return ModelName.parse(name).key in self._static

    def check(self, entry: Entry) -> None:
        """Demand that the files are what they were."""
        if self.store is not None and entry.manifest is not None:
            self.store.check(entry.manifest)

    def list(self) -> list[Entry]:
        """Return all models: those of the command line, then the store's, the newest first."""
        stored = [] if self.store is None else [_store_entry(manifest) for manifest in self.store.list()]
        shown = [entry for entry in stored if ModelName.parse(entry.name).key not in self._static]
        return [*self._static.values(), *shown]

    def need_store(self) -> Store:
        """Return the store, or refuse what needs one."""
        if self.store is None:
            raise Problem(400, "this server has no store of models: start it without --no-store")
        return self.store


def _static_entry(model: StaticModel) -> Entry:
    files = [path for path in (model.target, model.draft) if path is not None]
    stats = [path.stat() for path in files]
    facts = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    identity = repr([[str(path.resolve()) for path in files], facts])
    return Entry(
        name=str(ModelName.parse(model.name)),
        target=model.target,
        draft=model.draft,
        digest=hashlib.sha256(f"{identity} {model.template}".encode()).hexdigest(),
        size=sum(stat.st_size for stat in stats),
        modified_at=datetime.fromtimestamp(max(stat.st_mtime for stat in stats), UTC),
        details=describe([model.target]).to_dict(),
        capabilities=list_capabilities(model.target),
        template=model.template,
        parameters={},
    )


def _store_entry(manifest: Manifest) -> Entry:
    return Entry(
        name=manifest.name,
        target=manifest.target_path,
        draft=manifest.draft_path,
        digest=manifest.digest.removeprefix("sha256:"),
        size=manifest.size,
        modified_at=manifest.modified_at,
        details=manifest.details.to_dict(),
        capabilities=(),
        system=manifest.system or "",
        license=manifest.license or "",
        parameters=manifest.parameters,
        messages=manifest.messages,
        manifest=manifest,
    )
