"""Manifest: what an exported directory says of itself; a damaged or foreign one is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from adaround_ext.files import check_keys, check_type, folder_beside, take_place, write_atomically

NAME = "adaround.json"
_FORMAT = "adaround_ext.export.1"
_KEYS = {"format", "kind", "details", "files", "digest"}
_PIECE = 1 << 20
_LARGEST = 1 << 28  # bytes of a manifest: far above one of any model


@dataclass(frozen=True)
class Manifest:
    """What an export says of itself.

    Attributes:
        kind: The export format.
        details: What it says of the model, plain values for JSON.
    """

    kind: str
    details: dict[str, Any]


@contextmanager
def new_export(folder: str | os.PathLike[str], kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A directory to write an export to, and a dict for what the manifest is to say of it.

    It becomes ``folder``, with its manifest, when all is written; after an error nothing is left.
    ValueError unless ``folder`` is new or an empty directory; OSError that names it, with the
    cause, where it cannot be written.
    """
    folder = new_folder(folder)
    with folder_beside(folder) as staging:
        try:
            details: dict[str, Any] = {}
            yield staging, details
            write_manifest(staging, kind, details)
            take_place(staging, folder)
        except BaseException as error:
            unwritten = _unwritten(error, staging)
            if unwritten is None:
                raise
            text = f"folder must be one that can be written to, {folder}, got "
            if unwritten.errno is None:
                raise OSError(f"{text}{unwritten}") from error
            raise OSError(unwritten.errno, f"{text}{os.strerror(unwritten.errno)}") from error


def _unwritten(error: BaseException, folder: Path) -> OSError | None:
    """What the system said to a file that could not be written; None for another error.

    Libraries that write files may not pass it on: then it is asked again, for every file.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, (OSError, SafetensorError, RuntimeError)):
        for path in (*folder.rglob("*"), folder / NAME):
            try:
                if not path.is_dir():
                    with path.open("ab") as file:
                        file.write(bytes(_PIECE))
            except OSError as cause:
                return cause
    return OSError(str(error)) if isinstance(error, (OSError, SafetensorError)) else None


def new_folder(folder: object) -> Path:
    """Its absolute path; ValueError unless ``folder`` is new or an empty directory."""
    path = path_of(folder).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"folder must be new or empty, got {path}")
    return path


def path_of(folder: object) -> Path:
    """A path, which may begin with ~; TypeError for what is none."""
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a path, got {type(folder).__name__}")
    return Path(folder).expanduser()


def write_manifest(
    folder: Path, kind: str, details: Mapping[str, Any], names: Iterable[str] | None = None
) -> None:
    """Writes the manifest: sizes and hashes of the files ``names``, or of all that are there."""
    if names is None:
        paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
        names = sorted(str(path.relative_to(folder)) for path in paths)
    files = {name: _state(folder / name) for name in names}
    content = {"format": _FORMAT, "kind": kind, "details": dict(details), "files": files}
    content["digest"] = _digest(content)
    write_atomically(folder / NAME, _text(content))


def read_manifest(folder: str | os.PathLike[str], kind: str | None = None) -> Manifest:
    """The manifest of an export, after checking that every file is as it was written.

    Args:
        folder: A directory that an export wrote; it may begin with ~.
        kind: The format that it must have, or None for any.

    Raises:
        FileNotFoundError: There is no manifest.
        ValueError: It is damaged, or of another ``kind``, or files are missing, changed or cut.
    """
    folder = path_of(folder)
    path = folder / NAME
    rule = f"{folder} must be a directory that an export wrote"
    if not path.is_file():
        raise FileNotFoundError(f"{rule}, got none with {NAME}")
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{NAME} has {path.stat().st_size} bytes")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        check_type(content, dict, NAME, "a dict")
        check_keys(content, _KEYS, NAME)
        if content["format"] != _FORMAT:
            raise ValueError(f"{NAME} is of format {content['format']!r}, not {_FORMAT!r}")
        written = {name: value for name, value in content.items() if name != "digest"}
        if content["digest"] != _digest(written) or text != _text(content):
            raise ValueError(f"{NAME} is not as it was written")
        check_type(content["kind"], str, "kind", "text")
        check_type(content["details"], dict, "details", "a dict")
        check_type(content["files"], dict, "files", "a dict")
        if kind not in (None, content["kind"]):
            raise ValueError(f"it holds the format {content['kind']!r}, not {kind!r}")
        for name, state in content["files"].items():
            _check_file(folder, name, state)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{rule}: {error}") from error
    return Manifest(content["kind"], content["details"])


def _check_file(folder: Path, name: str, state: object) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{name} is not there")
    if not isinstance(state, dict) or path.stat().st_size != state.get("size"):
        raise ValueError(f"{name} has another size than when it was written")
    if _state(path) != state:
        raise ValueError(f"{name} has other content than when it was written")


def _state(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
