"""The run folder: where a run's files lie, on a local path or on any file system that pyarrow opens.

Owns the paths, writing the small files, and bringing them to a far file system, also after a failure. It does not own
what the files say (`recorder.py`), nor the weights (the engine exports them, to `export_path`).

    <storage path>/<name>/  plan.json  prediction.json  metrics.jsonl  timeline.json  result.json  model.safetensors
                            logs/
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

__all__ = ["PREDICTION_NAME", "WEIGHTS_NAME", "RunFolder", "fetch", "is_uri", "weights_target"]

WEIGHTS_NAME = "model.safetensors"
PREDICTION_NAME = "prediction.json"
_LEFT_BY_RAY = (".validate_storage_marker", "checkpoint_manager_snapshot.json")


def is_uri(path: str) -> bool:
    """Whether `path` names a file system of its own ("s3://bucket/runs") rather than a local folder."""
    return "://" in path


class RunFolder:
    """One run's folder. A far one is staged in a temporary folder, and copied by `finish`."""

    def __init__(self, storage_path: str | os.PathLike[str] | None, name: str) -> None:
        """Make the folder. Raises ValueError where one of that name holds files already."""
        storage = os.fspath(storage_path) if storage_path is not None else "runs"
        self._is_far = is_uri(storage)
        if self._is_far:
            self.storage_path = storage.rstrip("/").replace(" ", "%20")
            self.path: Path | str = f"{self.storage_path}/{name}"
            if _far_files(self.path):
                raise ValueError(f"the run folder {self.path} exists already; give another name= or storage_path=")
            self.local = Path(tempfile.mkdtemp(prefix="outgrow-run-"))
        else:
            self.storage_path = str(Path(storage).expanduser().resolve())
            self.path = self.local = Path(self.storage_path) / name
            if self.local.exists() and any(self.local.iterdir()):
                raise ValueError(f"the run folder {self.local} exists already; give another name= or storage_path=")
            self.local.mkdir(parents=True, exist_ok=True)
        self.name = name

    def write_json(self, name: str, value: Any) -> None:
        """Write one file whole: it is there complete or not at all."""
        target = self.local / name
        partial = target.with_name(target.name + ".partial")
        partial.write_text(value if isinstance(value, str) else json.dumps(value, indent=1), encoding="utf-8")
        partial.replace(target)

    def open_append(self, name: str) -> TextIO:
        """A text file to append lines to, flushed line by line."""
        return (self.local / name).open("a", encoding="utf-8", buffering=1)

    def finish(self) -> None:
        """Bring a far folder's staged files to where they belong; sweep what Ray left in it."""
        if not self._is_far:
            for name in _LEFT_BY_RAY:
                (self.local / name).unlink(missing_ok=True)
            return
        from pyarrow import fs

        filesystem, root = fs.FileSystem.from_uri(str(self.path))
        filesystem.create_dir(root, recursive=True)
        fs.copy_files(str(self.local), root, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
        for name in _LEFT_BY_RAY:
            if filesystem.get_file_info(f"{root}/{name}").is_file:
                filesystem.delete_file(f"{root}/{name}")
        shutil.rmtree(self.local)


@contextmanager
def weights_target(run_path: str) -> Iterator[Path]:
    """A local path to export weights to; brought into the run folder on the way out, also if that is far."""
    if not is_uri(run_path):
        yield Path(run_path) / WEIGHTS_NAME
        return
    from pyarrow import fs

    with tempfile.TemporaryDirectory(prefix="outgrow-weights-") as folder:
        path = Path(folder) / WEIGHTS_NAME
        yield path
        if path.exists():  # only rank 0 writes weights
            filesystem, root = fs.FileSystem.from_uri(run_path)
            filesystem.create_dir(root, recursive=True)
            fs.copy_files(
                str(path),
                f"{root}/{WEIGHTS_NAME}",
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=filesystem,
            )


@contextmanager
def fetch(run_path: Path | str, name: str) -> Iterator[Path]:
    """A local copy of a run folder's file, for the time of the block. Raises FileNotFoundError."""
    if not is_uri(str(run_path)):
        yield Path(run_path) / name
        return
    from pyarrow import fs

    filesystem, root = fs.FileSystem.from_uri(str(run_path))
    with tempfile.TemporaryDirectory(prefix="outgrow-fetch-") as folder:
        path = Path(folder) / name
        fs.copy_files(
            f"{root}/{name}", str(path), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
        )
        yield path


def _far_files(uri: str) -> bool:
    from pyarrow import fs

    filesystem, root = fs.FileSystem.from_uri(uri)
    return bool(filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True)))
