"""Commands on the store of models, named and laid out as Ollama's: pull, create, list, show, ps, rm, cp, stop.

Owns: what these commands take and print. Must not know: how models are kept or run. What is kept is read from the
store itself, so all of them but `ps` and `stop` work without a server. Main thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_cpp.server_client import ask
from dspark_cpp.store_progress import follow

if TYPE_CHECKING:
    from dspark_cpp.store import Manifest, Modelfile, Store

__all__ = ["register"]

_Draft = Annotated[str | None, typer.Option("--draft", "-d", help="Its drafter: a GGUF file, or owner/repo[:file].")]
_PATH_STARTS = (".", "/", "~")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (pull, create, show, ps, rm, cp, stop):
        app.command()(command)
    app.command("list")(list_models)
    app.command("ls", hidden=True)(list_models)


def pull(
    name: Annotated[str, typer.Argument(help="owner/repo[:quantization] of the hub, also with hf.co/ before it.")],
    draft: Annotated[str | None, typer.Option("--draft", "-d", help="owner/repo[:file] of its drafter.")] = None,
) -> None:
    """Fetch a model from the hub, with its drafter if it has one."""
    follow(_store().pull(name, draft=draft))


def create(
    name: Annotated[str, typer.Argument(help="Name of the new model.")],
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Modelfile (default: ./Modelfile).")] = None,
    target: Annotated[str | None, typer.Option(help="GGUF file or model; instead of a Modelfile.")] = None,
    draft: _Draft = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """Make a model of GGUF files where they lie, of another model, or by a Modelfile."""
    from dspark_cpp.store import Modelfile, parse_modelfile

    if target is not None and file is not None:
        raise ValueError("only one of --target and --file must be given, got both")
    folder = Path()
    if target is not None:
        recipe = Modelfile(source=target)
    else:
        path = file or Path("Modelfile")
        recipe, folder = parse_modelfile(path.read_text(encoding="utf-8")), path.parent
    recipe.draft = draft if draft is not None else _beside(folder, recipe.draft)
    recipe.system = system if system is not None else recipe.system
    recipe.source = recipe.source if target is not None else _beside(folder, recipe.source) or ""
    for warning in recipe.warnings:
        typer.echo(f"warning: {warning}", err=True)
    _create(_store(), name, recipe)


def list_models(
    prefix: Annotated[str, typer.Argument(help="Only names that begin with it.")] = "",
) -> None:
    """List the models of the store."""
    from dspark_cpp.store_show import describe_age, format_bytes, format_table

    rows = [
        (model.name, _short(model.digest), format_bytes(model.size), describe_age(model.modified_at))
        for model in _store().list()
        if model.name.lower().startswith(prefix.lower())
    ]
    typer.echo(format_table(("NAME", "ID", "SIZE", "MODIFIED"), rows))


def show(
    name: Annotated[str, typer.Argument(help="A model of the store.")],
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Only its Modelfile.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Only its parameters.")] = False,
    system: Annotated[bool, typer.Option("--system", help="Only its system message.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Only its template.")] = False,
    license: Annotated[bool, typer.Option("--license", help="Only its license.")] = False,
) -> None:
    """Show what a model of the store is."""
    from dspark_cpp.store_show import describe_model, describe_parameters

    chosen: dict[Callable[[Manifest], str], bool] = {
        _render: modelfile,
        describe_parameters: parameters,
        lambda found: found.system or "": system,
        lambda found: found.template or "": template,
        lambda found: found.license or "": license,
    }
    if sum(chosen.values()) > 1:
        raise ValueError("only one of --modelfile, --parameters, --system, --template and --license must be given")
    tell = next((tell for tell, is_chosen in chosen.items() if is_chosen), describe_model)
    store = _store()
    manifest = store.get(name)
    store.check(manifest)
    typer.echo(tell(manifest))


def ps() -> None:
    """List the models that the running server has loaded."""
    from dspark_cpp.store_show import describe_age, describe_processor, format_bytes, format_table

    rows = [
        (
            model["name"],
            _short(model.get("digest", "")),
            format_bytes(model.get("size", 0)),
            describe_processor(model.get("size", 0), model.get("size_vram", 0)),
            str(model.get("context_length", "")),
            describe_age(datetime.fromisoformat(model["expires_at"])),
        )
        for model in ask("GET", "/api/ps")["models"]
    ]
    typer.echo(format_table(("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"), rows))


def rm(names: Annotated[list[str], typer.Argument(help="Models of the store.")]) -> None:
    """Remove models; files that are used where they lie stay."""
    store = _store()
    for name in names:
        store.delete(name)
        typer.echo(f"deleted '{name}'")


def cp(
    source: Annotated[str, typer.Argument(help="A model of the store.")],
    destination: Annotated[str, typer.Argument(help="Its second name.")],
) -> None:
    """Give a model a second name."""
    _store().copy(source, destination)
    typer.echo(f"copied '{source}' to '{destination}'")


def stop(name: Annotated[str, typer.Argument(help="A model that is loaded.")]) -> None:
    """Tell the running server to unload a model."""
    ask("POST", "/api/generate", {"model": name, "keep_alive": 0})


def _create(store: Store, name: str, recipe: Modelfile) -> None:
    sources: dict[str, Any] = {}
    if _is_path(recipe.source):
        sources["target"] = recipe.source
    else:
        sources["from_"] = recipe.source
        _pull_missing(store, recipe.source)
    if recipe.draft is not None and _is_path(recipe.draft):
        sources["draft"] = recipe.draft
    elif recipe.draft is not None:
        sources["draft_files"] = follow(store.pull_drafter(recipe.draft))
    typer.echo("writing manifest", err=True)
    store.create(
        name,
        **sources,
        system=recipe.system,
        template=recipe.template,
        license=recipe.license,
        parameters=recipe.parameters,
        messages=recipe.messages or None,
    )
    typer.echo("success", err=True)


def _pull_missing(store: Store, name: str) -> None:
    from dspark_cpp.errors import ModelNotFoundError
    from dspark_cpp.store import ModelName

    try:
        store.get(name)
    except ModelNotFoundError:
        if ModelName.parse(name).repo is None:
            raise
        follow(store.pull(name))


def _beside(folder: Path, source: str | None) -> str | None:
    """Return a Modelfile's path as seen from here; what is no path is a name and stays."""
    if source is None or source.startswith("~") or not (_is_path(source) or (folder / source).exists()):
        return source
    return str(folder / source)


def _is_path(source: str) -> bool:
    is_file_name = source.lower().endswith(".gguf") and ":" not in source  # owner/repo:file.gguf is one of the hub
    return is_file_name or source.startswith(_PATH_STARTS) or Path(source).is_file()


def _store() -> Store:
    from dspark_cpp.store import Store

    return Store()


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _render(manifest: Manifest) -> str:
    from dspark_cpp.store import render_modelfile

    return render_modelfile(manifest)
