"""`outgrow train FILE.py:NAME`: load the file, call the function, train what it returns.

Owns finding the function and telling `Runtime`'s arguments from `Runtime.train`'s. The file's module travels to the
workers by value, because they cannot import it.
"""

import importlib.util
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from ..memory.budget import Memory
from .api import Runtime
from .result import Result

__all__ = ["arguments_of", "load_function", "run_file", "split_arguments"]


def run_file(
    target: str,
    workers: int | None = None,
    memory: str | None = None,
    name: str | None = None,
    disk: str | None = None,
) -> Result:
    """Train what `FILE.py:NAME` says. Options that are not None override the function's.

    Raises:
        ValueError: no such file or function, or arguments that nobody knows.
    """
    for_runtime, for_train = arguments_of(target, disk, workers=workers, memory=memory, name=name)
    result = Runtime(**for_runtime).train(**for_train)
    Console().print(f"{result}\nrun folder: {result.path}", markup=False, highlight=False, soft_wrap=True)
    return result


def arguments_of(target: str, disk: str | None, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `Runtime` and of `Runtime.train` that a function returns, with the options that are not None in
    place of its own.

    Raises:
        ValueError: no such file or function, or arguments that nobody knows.
    """
    arguments = load_function(target)()
    if not isinstance(arguments, dict):
        raise ValueError(f"{target} must return a dict of train's arguments, got {type(arguments).__name__}")
    arguments |= {key: value for key, value in options.items() if value is not None}
    if isinstance(arguments.get("memory"), str | int):
        arguments["memory"] = Memory(host=arguments["memory"])
    if disk is not None:
        arguments["memory"] = replace(arguments.get("memory") or Memory(), disk=disk)
    return split_arguments(arguments)


def split_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `Runtime` and those of `Runtime.train`. Raises ValueError for a name that neither has."""
    of_runtime = [name for name in inspect.signature(Runtime).parameters if name != "self"]
    of_train = [name for name in inspect.signature(Runtime.train).parameters if name != "self"]
    unknown = sorted(set(arguments) - set(of_runtime) - set(of_train))
    if unknown:
        raise ValueError(f"unknown arguments: {', '.join(unknown)}; known are {', '.join(of_train + of_runtime)}")
    return (
        {name: value for name, value in arguments.items() if name in of_runtime},
        {name: value for name, value in arguments.items() if name in of_train},
    )


def load_function(target: str) -> Any:
    """The function that "FILE.py:NAME" names. Raises ValueError where there is none."""
    file, _, name = target.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name.isidentifier():
        raise ValueError(f"give the target as FILE.py:NAME, got {target!r}")
    if not path.is_file():
        raise ValueError(f"there is no file {path} (from {target!r})")
    module = _load_module(path.resolve())
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(functions) or 'none'}")
    return function


def _load_module(path: Path) -> ModuleType:
    from ray import cloudpickle

    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"_outgrow_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # as if the file were run as a script
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    return module
