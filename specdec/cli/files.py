"""Files that commands read and folders that they write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from specdec.contract.errors import InvalidArgumentError


class OutputFolder(click.ParamType[Any]):
    """A folder for the files of a command. It is made before the work that fills it, so that none is lost."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the folder, which exists then and can be written to."""
        folder = Path(value)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.fail(f"{folder} cannot be made ({error.strerror}); choose another folder.", param, ctx)
        if not os.access(folder, os.W_OK | os.X_OK):
            self.fail(f"{folder} cannot be written to; choose another folder.", param, ctx)
        return folder


def read_text(path: Path, what: str) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Args:
        what: what the file is, for the message.

    Raises:
        InvalidArgumentError: the file cannot be read, or has another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{what} {path} is not UTF-8 ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise InvalidArgumentError(f"{what} {path} cannot be read: {error.strerror}.") from error
