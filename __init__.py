"""Outgrow: train models that have outgrown your memory.

The face of the package: names only. Importing it loads neither torch nor ray; each name loads its home on first use.
Layers point down only: perf > runtime > scheduler > parallel > memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory.budget import Memory as Memory
    from .memory.errors import OutgrowError as OutgrowError
    from .runtime.api import Runtime as Runtime
    from .runtime.callbacks import Callback as Callback
    from .runtime.engine import Engine as Engine
    from .runtime.result import Result as Result

__version__ = "0.1.0"

_HOMES = {
    "Callback": ".runtime.callbacks",
    "Engine": ".runtime.engine",
    "Memory": ".memory.budget",
    "OutgrowError": ".memory.errors",
    "Result": ".runtime.result",
    "Runtime": ".runtime.api",
}
__all__ = ["Callback", "Engine", "Memory", "OutgrowError", "Result", "Runtime"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'outgrow' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name], __name__), name)
