"""The errors that dspark_cpp raises on its own account.

A caller's mistake (a bad option, an empty prompt) is a ValueError or TypeError and has no class here. The C++ side
raises these same classes, so a caller catches one tree.
"""

__all__ = [
    "BlobError",
    "ContextFullError",
    "DSparkError",
    "DecodeError",
    "EngineClosedError",
    "ModelLoadError",
    "ModelMismatchError",
    "ModelNotFoundError",
    "PullError",
    "QueueFullError",
    "StoreError",
]


class DSparkError(Exception):
    """Base class of every error of this package."""


class ModelLoadError(DSparkError):
    """A model file or checkpoint cannot be read, is damaged, or holds something unsupported."""


class ModelMismatchError(DSparkError):
    """Target and drafter do not belong together; the message names every reason."""


class ContextFullError(DSparkError):
    """A prompt or a text no longer fits into the context."""


class QueueFullError(DSparkError):
    """The bounded queue of waiting requests is full."""


class DecodeError(DSparkError):
    """A forward pass failed."""


class EngineClosedError(DSparkError):
    """The engine was used after `close`."""


class StoreError(DSparkError):
    """The store of models is damaged or cannot do what was asked."""


class ModelNotFoundError(StoreError):
    """No model of this name is in the store."""


class BlobError(StoreError):
    """A file of a model is missing, damaged or not the one it should be."""


class PullError(StoreError):
    """The hub cannot be reached or does not have what was asked for."""
