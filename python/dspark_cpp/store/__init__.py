"""The store of models: content-addressed files, and names that tie a target, its drafter and their options together.

`Store` is the way in. Nothing here knows HTTP, the terminal or the engine.
"""

from dspark_cpp.store.files import default_root
from dspark_cpp.store.manifest import Details, Manifest, ModelFile
from dspark_cpp.store.modelfile import Modelfile, parse_modelfile, render_modelfile
from dspark_cpp.store.names import ModelName, checked_digest, hub_endpoint
from dspark_cpp.store.store import Store

__all__ = [
    "Details",
    "Manifest",
    "ModelFile",
    "ModelName",
    "Modelfile",
    "Store",
    "checked_digest",
    "default_root",
    "hub_endpoint",
    "parse_modelfile",
    "render_modelfile",
]
