"""Files and folders written whole or not at all, with ordinary rights; typed JSON."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

_ORDINARY = 0o666


def path_from(path: str | os.PathLike[str]) -> Path:
    """``path`` with a leading ~ as the home directory."""
    return Path(path).expanduser()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new empty file beside ``path`` that takes its place at the end, or goes on an error.

    It ends with the rights that the umask leaves, whatever is done to it in between.

    Args:
        path: The file to write or to replace, in a folder that exists.

    Yields:
        The path of the file to write to.
    """
    temporary = _beside(path, path.name)
    try:
        temporary.touch(_ORDINARY, exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some libraries write for the owner alone
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new empty folder beside ``path``, which goes at the end unless it took its place.

    Args:
        path: Where :func:`take_place` is to bring it; folders above it are made.

    Yields:
        The path of the folder to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(path, f".{path.name}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take_place(folder: Path, path: Path, overwrite: bool = False) -> None:
    """Moves a folder that was made by :func:`folder_beside` to ``path``, with ordinary rights.

    A folder at ``path`` that is empty stays, and gets the files: it may be somebody's current
    directory.

    Args:
        folder: What was written.
        path: Where it belongs.
        overwrite: Whether it replaces a folder with files, which are deleted.

    Raises:
        OSError: It cannot be moved, or there are files and ``overwrite`` is False. What was at
            ``path`` is still there.
    """
    share_files(folder)
    if path.is_dir() and not any(path.iterdir()):
        for item in folder.iterdir():
            item.rename(path / item.name)
        return
    if not overwrite or not path.exists():
        os.replace(folder, path)
        return
    former = path.with_name(f"{folder.name}.old")
    os.replace(path, former)
    try:
        os.replace(folder, path)
    except BaseException:
        os.replace(former, path)
        raise
    shutil.rmtree(former)


def share_files(folder: Path) -> None:
    """Gives files in a folder that was just made the rights that files there get by themselves.

    Some libraries write for the owner alone.
    """
    rights = folder.stat().st_mode & _ORDINARY
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(rights)


def _beside(path: Path, name: str) -> Path:
    """A path nobody uses in the same folder, and so on the same disk: the rename is atomic."""
    return path.with_name(f"{name}.{secrets.token_hex(4)}.part")


class JsonFile(ABC):
    """Results that a JSON file holds, whole or not at all."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, and the format's name."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all.

        Args:
            path: The file, which is replaced if it is there; ~ is the home directory.

        Raises:
            OSError: It cannot be written.
        """
        write_atomically(path_from(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`save` wrote.

        Args:
            path: The file; ~ is the home directory.

        Raises:
            ValueError: It is another file.
            OSError: It cannot be read.
        """
        data = path_from(path).read_bytes()
        try:
            return cls.from_dict(json.loads(data))
        except (ValueError, RecursionError) as error:
            rule = f"a file written by {cls.__name__}.save"
            raise ValueError(f"{path} must be {rule}: {error}") from error


def read_value(hint: Any, value: Any, where: str) -> Any:
    """``value``, as JSON has it, as what an annotation says.

    Args:
        hint: The annotation: a plain type, a tuple or dict of such, one of these or None, or a
            dataclass, whose ``check_plain`` is asked where it has one.
        value: What ``json.loads`` gave.
        where: Its place, for the message.

    Raises:
        ValueError: It is something else.
    """
    if hint is Any:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # with None: there are no others here
        return None if value is None else read_value(inner[0], value, where)
    if origin is tuple:
        check_type(value, (list, tuple), where, "a list")
        return tuple(read_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        check_type(value, Mapping, where, "a dict")
        return {
            str(key): read_value(inner[1], item, f"{where}.{key}") for key, item in value.items()
        }
    fields: Any = getattr(hint, "__dataclass_fields__", None)
    if fields is None:
        check_type(value, (int, float) if hint is float else hint, where, hint.__name__)
        return value
    check_type(value, Mapping, where, "a dict")
    # What is computed is written for readers, and not read.
    computed = {name for name in value if isinstance(getattr(hint, str(name), None), property)}
    value = {name: item for name, item in value.items() if name not in computed}
    hints = typing.get_type_hints(hint, hint.__init__.__globals__)
    check_keys(value, set(hints), where)
    if hasattr(hint, "check_plain"):
        hint.check_plain(value, where)
    return hint(
        **{name: read_value(h, value[name], f"{where}.{name}") for name, h in hints.items()}
    )


def check_type(value: Any, kinds: Any, where: str, rule: str) -> None:
    """ValueError unless ``value`` is of these kinds."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ValueError(f"{where} must be {rule}, got {type(value).__name__}")


def check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    """ValueError unless the keys are exactly ``known``."""
    for title, names in (("unknown", set(values) - known), ("missing", known - set(values))):
        if names:
            rule = f"{where} must have the keys {', '.join(sorted(known))}"
            raise ValueError(f"{rule}, got {title} {', '.join(map(repr, sorted(names, key=str)))}")
