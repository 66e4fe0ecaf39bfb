"""The store: models by name.

Owns: the folder of manifests, the lock on it, what a name stands for. Must not know: HTTP, the terminal, the engine.

Every change of a manifest is one rename under one lock; blobs come first and go last. So a crash leaves either the old
or the new state, and at most blobs that nobody references: `collect` frees those. Any thread, any process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dspark_cpp.errors import BlobError, ModelLoadError, ModelMismatchError, ModelNotFoundError, StoreError
from dspark_cpp.store import model_files
from dspark_cpp.store.blobs import BlobStore
from dspark_cpp.store.files import default_root, list_below, locked, remove_file, write_atomically
from dspark_cpp.store.hub import HubFile, HubSource, choose_drafter, choose_target, find_drafter, list_files
from dspark_cpp.store.manifest import Manifest, ModelFile, checked_message, checked_text
from dspark_cpp.store.names import ModelName, checked_digest
from dspark_cpp.store.parameters import checked_parameters
from dspark_cpp.store.parts import collect_links, in_order, linked_path, parts_beside
from dspark_cpp.store.pull import Record, pull_file

__all__ = ["Store"]

_log = logging.getLogger(__name__)
_ORPHAN_AGE_S = 24 * 3600.0  # a blob that was sent, and the `create` that will name it, may be hours apart


class Store:
    """Models by name, below one folder.

    Parameters
    ----------
    root
        The folder; None is `default_root()`. It is made when the first model comes.

    Examples
    --------
    >>> store = Store()  # doctest: +SKIP
    >>> store.create("mine", target="target.gguf", draft="drafter.gguf", system="Be brief.")  # doctest: +SKIP
    >>> store.get("mine").target_path  # doctest: +SKIP
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = (default_root() if root is None else Path(root).expanduser()).resolve()
        self.blobs = BlobStore(self.root)
        self._manifests = self.root / "manifests"
        self._links = self.root / "links"
        self._lock = self.root / "locks" / "store"

    def get(self, name: str) -> Manifest:
        """Return the model of this name. Its files are not looked at: see `check`.

        Raises
        ------
        ModelNotFoundError
            If there is none.
        StoreError
            If its manifest is damaged.
        ValueError
            If this cannot be a name.
        """
        return self._read(self._path(ModelName.parse(name)), name)

    def check(self, manifest: Manifest) -> None:
        """Demand that the files of a model are here and are what they were; reads their headers (milliseconds).

        To be called before a model is loaded.

        Raises
        ------
        BlobError
            If one is missing, damaged or was changed.
        """
        for file in manifest.files:
            model_files.check_file(file, self._file_path(file))

    def create(
        self,
        name: str,
        *,
        from_: str | None = None,
        target: str | os.PathLike[str] | None = None,
        files: Mapping[str, str] | None = None,
        draft: str | os.PathLike[str] | None = None,
        draft_files: Mapping[str, str] | None = None,
        system: str | None = None,
        template: str | None = None,
        license: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Make a model, or replace the one of this name.

        Parameters
        ----------
        name
            Its name.
        from_, target, files
            Where the target comes from, one of the three: another model of the store (everything else is then taken
            from it too, as far as it is not given here), a GGUF file that stays where it is, or blobs by file name.
            A server must not pass on a path that a client sent.
        draft, draft_files
            Likewise the drafter: a file that stays where it is, or a blob by file name.
        system, template, license
            Texts; None leaves those of `from_`.
        parameters
            Options by Ollama's names; they add to those of `from_`.
        messages
            Conversation that every chat begins with.
        origins
            Where blobs came from, by digest.

        Raises
        ------
        ModelNotFoundError
            If there is no model `from_`.
        BlobError
            If a blob is not here.
        ModelLoadError
            If a file is no sound GGUF file of its kind.
        ModelMismatchError
            If the drafter was made for another target.
        ValueError, TypeError
            If an argument is bad.
        """
        parsed = ModelName.parse(name)
        if sum(source is not None for source in (from_, target, files)) != 1:
            raise ValueError("exactly one of from, target and files must be given")
        if draft is not None and draft_files is not None:
            raise ValueError("only one of draft and draft_files must be given, got both")
        base = self._base(from_, target, files, origins or {})
        found_draft = self._draft(draft, draft_files, origins or {})
        manifest = replace(
            base,
            name=str(parsed),
            draft=base.draft if found_draft is None else found_draft,
            system=base.system if system is None else checked_text("system", system),
            template=base.template if template is None else checked_text("template", template),
            license=base.license if license is None else checked_text("license", license),
            parameters={**base.parameters, **checked_parameters(parameters or {})},
            messages=base.messages if messages is None else tuple(map(checked_message, messages)),
        )
        self._check_new(manifest, is_pair_new=from_ is None or found_draft is not None)
        return self._write(parsed, manifest)

    def pull(self, name: str, *, draft: str | None = None) -> Generator[Record]:
        """Fetch a model from the hub and give it this name.

        Parameters
        ----------
        name
            `[hf.co/]owner/repo[:tag]`; the tag is a quantization or a file name, without one Q4_K_M is taken if there.
        draft
            Its drafter, `owner/repo[:file]`; None takes one that lies beside the target and fits, if there is one.

        Yields
        ------
        dict
            Ollama's progress records: `status`, and while bytes come `digest`, `total` and `completed`. The last
            status is `success`. Closing the iterator stops the pull; the next one goes on from there.

        Raises
        ------
        PullError
            If the hub cannot be reached, does not have it, or sends something else.
        ModelLoadError, ModelMismatchError
            If what it has is no model, or the drafter was made for another target.
        ValueError
            If a name is no repository of the hub.
        """
        source = HubSource.parse(name)
        draft_source = None if draft is None else HubSource.parse(draft)
        yield {"status": "pulling manifest"}
        files = list_files(source.repo)
        target = choose_target(files, source.selector)
        drafter = find_drafter(files) if draft_source is None else _listed_drafter(draft_source)
        for file in target if drafter is None else [*target, drafter]:
            yield from pull_file(self.blobs, file)
        yield {"status": "writing manifest"}
        yield from self._create_pulled(name, target, drafter, is_draft_sure=draft is not None)
        yield {"status": "success"}

    def pull_drafter(self, source: str) -> Generator[Record, None, dict[str, str]]:
        """Fetch a drafter alone; the generator's value is what `create` takes as `draft_files`.

        Raises
        ------
        PullError, ValueError
            As `pull`.
        """
        yield {"status": "pulling manifest"}
        file = _listed_drafter(HubSource.parse(source))
        yield from pull_file(self.blobs, file)
        return {file.name: file.digest}

    def _create_pulled(
        self, name: str, target: Sequence[HubFile], drafter: HubFile | None, is_draft_sure: bool
    ) -> Iterator[Record]:
        files = {file.name: file.digest for file in target}
        origins = {file.digest: file.origin for file in (*target, *([drafter] if drafter else []))}
        draft_files = None if drafter is None else {drafter.name: drafter.digest}
        try:
            self.create(name, files=files, draft_files=draft_files, origins=origins)
        except (ModelLoadError, ModelMismatchError) as error:
            if drafter is None or is_draft_sure:
                raise
            yield {"status": f"leaving out {drafter.name}: {error}"}
            self.create(name, files=files, origins=origins)

    def copy(self, source: str, destination: str) -> Manifest:
        """Give a model a second name, replacing the one that had it.

        Raises
        ------
        ModelNotFoundError
            If there is no model `source`.
        """
        name = ModelName.parse(destination)
        return self._write(name, replace(self.get(source), name=str(name)))

    def delete(self, name: str) -> None:
        """Remove a name, and the blobs that no other name needs. Files in place stay.

        Raises
        ------
        ModelNotFoundError
            If there is no such model.
        """
        path = self._path(ModelName.parse(name))
        with locked(self._lock):
            try:
                blobs = self._read(path, name).blobs
            except ModelNotFoundError:
                raise
            except StoreError:
                blobs = frozenset()  # damaged: `collect` finds what it left
            remove_file(path, self._manifests)
            self._drop(blobs)

    def collect(self, min_age_s: float = _ORPHAN_AGE_S) -> int:
        """Free what nobody references: leftovers of crashes, uploads that were never named. Cheap; call it at a start.

        Parameters
        ----------
        min_age_s
            Blobs that were touched within this time stay: they may be about to be named.

        Returns
        -------
        int
            Bytes freed.
        """
        with locked(self._lock):
            for leftover in self._manifests.glob("*/*/.*.tmp"):
                leftover.unlink(missing_ok=True)
            manifests = self._read_all()
            if None in manifests:
                return 0  # what a damaged manifest needs is unknown
            whole = [manifest for manifest in manifests if manifest is not None]
            collect_links(self._links, [self._blob_paths(manifest) for manifest in whole])
            kept = {digest for manifest in whole for digest in manifest.blobs}
            return self.blobs.collect(kept, min_age_s)

    def list(self) -> tuple[Manifest, ...]:
        """Return all models, the newest first. A damaged manifest is left out with a warning."""
        manifests = [manifest for manifest in self._read_all() if manifest is not None]
        return tuple(sorted(manifests, key=lambda manifest: manifest.modified_at, reverse=True))

    def _base(
        self,
        from_: str | None,
        target: str | os.PathLike[str] | None,
        files: Mapping[str, str] | None,
        origins: Mapping[str, str],
    ) -> Manifest:
        if from_ is not None:
            base = self.get(from_)
            return replace(base, details=replace(base.details, parent_model=base.name))
        if target is not None:
            records = [model_files.record_in_place(part) for part in parts_beside(Path(target))]
        else:
            files = files or {}
            records = [self._record(files[part], origins) for part in in_order(files)]
        try:
            details = model_files.describe([self._file_path(record) for record in records])
        except ModelLoadError:
            for record in records:
                if record.digest is not None:
                    self._demand_blob(record.digest)
            raise
        return Manifest(name="", target=tuple(records), details=details)

    def _draft(
        self, draft: str | os.PathLike[str] | None, files: Mapping[str, str] | None, origins: Mapping[str, str]
    ) -> ModelFile | None:
        if draft is not None:
            return model_files.record_in_place(Path(draft))
        if not files:
            return None
        if len(files) != 1:
            raise ValueError(f"draft_files must hold one file, got {len(files)}")
        (digest,) = files.values()
        return self._record(digest, origins)

    def _record(self, digest: str, origins: Mapping[str, str]) -> ModelFile:
        digest = checked_digest(digest)
        self._demand_blob(digest)
        try:
            return model_files.record_blob(self.blobs.path(digest), digest, origins.get(digest))
        except ModelLoadError as error:
            self._demand_blob(digest)  # it may have gone with its last name meanwhile
            raise ModelLoadError(f"blob {digest}: {error}") from None

    def _demand_blob(self, digest: str) -> None:
        if not self.blobs.has(digest):
            raise BlobError(f"blob {digest} is not in the store: send it first")

    def _check_new(self, manifest: Manifest, is_pair_new: bool) -> None:
        if not is_pair_new:
            self.check(manifest)
            return
        try:
            self._check_pair(manifest)
        except ModelLoadError:
            for digest in manifest.blobs:
                self._demand_blob(digest)
            raise

    def _check_pair(self, manifest: Manifest) -> None:
        target = self._file_path(manifest.target[0])
        model_files.demand_kind(target, "target")
        if manifest.draft is not None:
            draft = self._file_path(manifest.draft)
            model_files.demand_kind(draft, "drafter")
            model_files.check_pair_of_files(target, draft)

    def _write(self, name: ModelName, manifest: Manifest) -> Manifest:
        path = self._path(name)
        with locked(self._lock):
            for digest in manifest.blobs:
                self._demand_blob(digest)
            try:
                before = self._read(path, str(name)).blobs
            except StoreError:
                before = frozenset()
            write_atomically(path, manifest.to_json())
            self._drop(before - manifest.blobs)
            return self._read(path, str(name))

    def _drop(self, digests: frozenset[str]) -> None:
        """Remove blobs that no manifest needs; the lock is held."""
        manifests = self._read_all() if digests else []
        if None in manifests:
            return
        needed = {digest for manifest in manifests if manifest is not None for digest in manifest.blobs}
        for digest in digests - needed:
            self.blobs.remove(digest)

    def _path(self, name: ModelName) -> Path:
        return self._manifests / name.key

    def _read(self, path: Path, name: str) -> Manifest:
        try:
            with path.open("rb") as file:
                modified_at = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
                manifest = Manifest.from_json(file.read(), modified_at)
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFoundError(f"model '{name}' not found") from None
        except StoreError as error:
            raise StoreError(f"model '{name}' is damaged ({path}): {error}") from None
        return self._with_paths(manifest)

    def _read_all(self) -> Sequence[Manifest | None]:
        """Return all manifests, None for each that is damaged."""
        found: list[Manifest | None] = []
        for path in list_below(self._manifests, "*/*/[!.]*"):
            try:
                found.append(self._read(path, "/".join(path.parts[-3:])))
            except ModelNotFoundError:  # just deleted
                continue
            except StoreError as error:
                _log.warning("%s", error)
                found.append(None)
        return found

    def _with_paths(self, manifest: Manifest) -> Manifest:
        target = self._file_path(manifest.target[0])
        if blobs := self._blob_paths(manifest):
            target = linked_path(self._links, blobs)
        draft = None if manifest.draft is None else self._file_path(manifest.draft)
        return replace(manifest, target_path=target, draft_path=draft)

    def _blob_paths(self, manifest: Manifest) -> Sequence[Path]:
        """Return the parts of a split target that lie in the store, none for a target in one file or in place."""
        parts = [self.blobs.path(file.digest) for file in manifest.target if file.digest is not None]
        return parts if len(parts) > 1 else ()

    def _file_path(self, file: ModelFile) -> Path:
        return Path(file.path) if file.digest is None and file.path else self.blobs.path(file.digest or "")


def _listed_drafter(source: HubSource) -> HubFile:
    return choose_drafter(list_files(source.repo), source.selector)
