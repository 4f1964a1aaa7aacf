"""Results that are either complete or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matchanything_ros.errors import UserError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder in `out`, or beside it if there is none yet; when the block ends well its files move into
    `out`, else they are removed.

    Files and folders of the same names in `out` are replaced, others stay. Raises UserError if `out` cannot be
    a folder.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder for the results.")
    try:
        # Until the results are there, `out` itself must not appear. If it is there, it may be all that can be written,
        # or a file system of its own, such as a container's volume.
        place = out.absolute() if out.is_dir() else out.absolute().parent
        place.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=place))
    except OSError as error:
        raise UserError(f"The folder {out} cannot be made ({error.strerror}): choose another for --out.") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        if out.exists():
            for entry in temporary.iterdir():
                if entry.is_dir():
                    shutil.rmtree(out / entry.name, ignore_errors=True)
                os.replace(entry, out / entry.name)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
