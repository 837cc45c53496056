"""Files: written atomically, downloaded and verified, and read without executing anything."""
import hashlib
import importlib
import io
import os
import pathlib
import pickle
import pickletools
import sys
import unicodedata
import zipfile
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from support.errors import Missing, Mistake, reason
from support.text import printable

# how a file of torch.save begins that was written before 1.6
LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
ASSETS = pathlib.Path(__file__).parent.parent / "assets"


def need(package: str, what: str):
    """Imports a package that only some commands need. Missing if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0].replace("_", "-")          # as PyPI spells it
        raise Missing(f"{what} needs {name}: pip install {name}") from error


def pyplot():
    """matplotlib.pyplot, set up to draw into files."""
    need("matplotlib", "drawing").use("Agg")    # before pyplot, which may look for a screen
    return need("matplotlib.pyplot", "drawing")


def save_figure(figure, path: str | os.PathLike) -> None:
    """Draws a figure into a file and closes it. Mistake for an unknown suffix."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    # no version of matplotlib in the file: it would change with every release
    metadata = {"Software": None} if path.suffix == ".png" else None
    try:
        figure.savefig(path, dpi=80, metadata=metadata)
    except ValueError as error:
        raise Mistake(f"{path} cannot be drawn: {error}") from error
    pyplot().close(figure)


def save(path: str | os.PathLike, content) -> None:
    """Writes a file atomically: it appears under its name only when it is complete.

    content    text, bytes, or a function that writes to the file object it is given"""
    path = pathlib.Path(path)
    if path.is_dir():
        raise Mistake(f"{path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, because a file cannot be renamed onto another disk
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            elif isinstance(content, str):
                file.write(content.encode("utf-8"))
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())     # else a power failure could leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)       # still there if writing failed


def save_tensors(path: str | os.PathLike, content: object) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()       # torch would hide a full disk behind an exception of its own
    torch.save(content, buffer)
    save(path, buffer.getbuffer())


def read_text(path: pathlib.Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark. Mistake for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is not UTF-8 text") from error


def numbered_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """(number from 1, line) of all lines that are not empty."""
    # subtle: not splitlines(), which also splits at characters that JSON allows within a string
    return [(i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def files_below(folder: str | os.PathLike) -> list[pathlib.Path]:
    """All files of a folder, sorted. Links to folders are followed, but each folder is entered
    once; one that cannot be listed is noted."""
    def note(error: OSError) -> None:
        print(printable(f"note: {error.filename} cannot be read: {error.strerror}"),
              file=sys.stderr)

    result = []
    entered = set()
    waiting = [os.fspath(folder)]       # links wait, so that a folder goes by its own name
    while waiting:
        for where, folders, names in os.walk(waiting.pop(0), onerror=note):
            real = os.path.realpath(where)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            paths = [pathlib.Path(where, name) for name in names]
            result += [path for path in paths if os.path.isfile(path)]
            below = [os.path.join(where, name) for name in folders]
            waiting += [path for path in sorted(below) if os.path.islink(path)]
    return sorted(result)


def find_files(folder: str | os.PathLike, endings: set[str]) -> dict[str, pathlib.Path]:
    """File name without ending -> file, for all such in a folder. Mistake if two share a name."""
    if not pathlib.Path(folder).is_dir():
        raise Mistake(f"there is no folder {folder}")
    result: dict[str, pathlib.Path] = {}
    for path in files_below(folder):
        if path.suffix.lower() in endings:
            # NFC, because a Mac may write an accent as a character of its own
            other = result.setdefault(unicodedata.normalize("NFC", path.stem), path)
            if other != path:
                raise Mistake(f"{other} and {path} have the same name, {path.stem}; remove one of "
                              f"them from {folder}")
    return result


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        block = file.read(1 << 22)              # in pieces: a CLIP may have more than a gigabyte
        while block:
            digest.update(block)
            block = file.read(1 << 22)
    return digest.hexdigest()


def fetch(address: str, digest: str, path: pathlib.Path) -> pathlib.Path:
    """Downloads `address` to `path`, unless a file with this SHA-256 is already there. Missing,
    with the address and where to put the file, if it cannot be downloaded."""
    if path.exists() and sha256(path) == digest:        # a damaged one is replaced
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # writes to a temporary name; RuntimeError for another SHA-256
        torch.hub.download_url_to_file(address, str(path), digest, sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        raise Missing(f"{address} could not be downloaded ({error}); run the command again, or "
                      f"download it by hand to {path}") from error
    return path


def save_arrays(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """numpy.savez, atomically."""
    save(path, lambda file: np.savez(file, **arrays))


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote. Mistake if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises a dozen types for a damaged or hostile file
        raise Mistake(f"{path} is damaged ({reason(error)}); remove it and rerun what made "
                      f"it") from error


def read_tensors(path: str | os.PathLike) -> object:
    """What torch.save wrote, in its present form or that of before 1.6: tensors and plain values.

    Nothing in the file is executed, a changed bit is detected (in the present form), and reading
    takes no more memory than twice the size of the file. Mistake for anything else."""
    foreign = ""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if file.read(len(LEGACY)) == LEGACY:
                foreign = _check_pickles(file, size)
            else:
                with zipfile.ZipFile(path) as archive:
                    foreign = _check_archive(archive, size)
        with open(path, "rb") as file:                  # torch would believe its name
            content = torch.load(file, map_location="cpu", weights_only=True)
        if _bytes_of(content, set()) > 2 * size:        # views may share one storage
            raise ValueError("its tensors claim more memory than the file has bytes")
    except OSError:                     # no such file, no permission: its own message says so
        raise
    except Exception as error:  # torch raises a dozen types for a damaged or hostile file
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise Mistake(f"{path} is not a valid weight file: it contains a {foreign}, not only "
                          f"tensors; save it again with torch.save(model.state_dict(), "
                          f"FILE)") from error
        raise Mistake(f"{path} is not a valid weight file: {reason(error)}") from error
    return content


def _check_archive(archive: zipfile.ZipFile, size: int) -> str:
    """ValueError for what torch.save never writes and torch.load does not notice. Returns as
    `_foreign`."""
    for part in archive.infolist():
        if part.volume or part.internal_attr or part.external_attr:     # torch misreads it
            raise ValueError("its zip directory was not written by torch.save")
    if sum(part.file_size for part in archive.infolist()) > size:       # a zip bomb
        raise ValueError("its parts are larger than the whole file")
    damaged = archive.testzip()                         # torch does not compare checksums
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    for part in archive.infolist():
        if part.filename.endswith("data.pkl"):
            return _foreign(pickletools.genops(archive.read(part)))
    return ""


def _check_pickles(file, size: int) -> str:
    """The same for a file of before torch 1.6: after LEGACY, four pickles and the bytes of the
    tensors."""
    foreign = ""
    for _ in range(4):
        operations = list(pickletools.genops(file))
        for _, argument, _ in operations:
            # the number of elements of a storage, for which torch allocates before it reads
            if isinstance(argument, int) and abs(argument) > max(size, 1 << 20):
                raise ValueError("its tensors claim more memory than the file has bytes")
        foreign = foreign or _foreign(operations)
    return foreign


def _foreign(operations: Iterable[tuple]) -> str:
    """The first class in a pickle that is not torch's for tensors; "" if there is none. ValueError
    for one that allocates memory."""
    found = ""
    for operation, argument, _ in operations:
        if "bytearray" in str(argument):                # which weights_only allows, of any size
            raise ValueError("it allocates memory for data that it does not contain")
        if operation.name == "GLOBAL" and not found:
            module, name = argument.split(" ", 1)
            if module not in ("torch", "torch._utils", "torch._tensor", "collections", "_codecs"):
                found = f"{module}.{name}"
    return found


def _bytes_of(content: object, seen: set[int]) -> int:
    """Memory of all tensors if copied: a stride of 0 lets a small file claim any shape."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if not isinstance(content, (dict, list, tuple)) or id(content) in seen:
        return 0
    seen.add(id(content))               # a list may contain itself
    if isinstance(content, dict):
        content = content.values()
    return sum(_bytes_of(value, seen) for value in content)
