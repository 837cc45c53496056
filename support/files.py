"""Files: written atomically, downloaded and verified, and read without executing anything."""
import difflib
import hashlib
import http.client
import importlib
import io
import os
import pathlib
import pickletools
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from support.errors import Missing, Mistake, reason

ASSETS = pathlib.Path(__file__).parent.parent / "assets"


def need(package: str, what: str):
    """Imports a package that only some commands need. Missing if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Missing(f"{what} needs {package}: pip install {package}") from error


def pyplot():
    """matplotlib.pyplot, set up to draw into files."""
    need("matplotlib", "drawing").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def save_figure(figure, path: str | os.PathLike, **more) -> None:
    """Draws a figure into a file and closes it. Mistake for an unknown suffix."""
    try:
        figure.savefig(path, dpi=80, **more)
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | os.PathLike, content: object) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()       # torch would hide a full disk behind an exception of its own
    torch.save(content, buffer)
    save(path, buffer.getbuffer())


def read_text(path: pathlib.Path) -> str:
    """The text of a UTF-8 file. Mistake for another encoding."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is not UTF-8 text") from error


def numbered_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """(number from 1, line) of all lines that are not empty."""
    return [(i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def did_you_mean(dataset: str, root: str | os.PathLike, published: Iterable[str]) -> str:
    """"did you mean charades? If not, " for the name of no dataset that resembles a published one
    or a folder below the root; else empty."""
    names = {*published, *(path.name for path in pathlib.Path(root).glob("*/"))}
    near = difflib.get_close_matches(dataset, sorted(names), 1)
    return f"did you mean {near[0]}? If not, " if near and dataset not in names else ""


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file, with a progress bar above a gigabyte."""
    digest, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc="SHA-256",
                                        disable=None if size > 1 << 30 else True) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- downloads

SILENCE_SEC = 60                        # give up on a server that sends nothing for so long


def fetch(address: str, digest: str, path: pathlib.Path) -> pathlib.Path:
    """Downloads `address` to `path`, unless a file with this SHA-256 is already there.

    An interrupted download is continued by the next call, and the file gets its name only after
    its SHA-256 has been verified. (torch.hub.download_url_to_file verifies, but cannot resume.)
    Mistake, with the address and where to put the file, if it cannot be downloaded."""
    part = path.with_name(path.name + ".part")
    if path.exists() and sha256(path) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = part.stat().st_size if part.exists() else 0
        if not done or sha256(part) != digest:
            request = urllib.request.Request(address)
            if done:
                request.add_header("Range", f"bytes={done}-")
            with urllib.request.urlopen(request, timeout=SILENCE_SEC) as reply:
                if reply.status != 206:         # the server sends the file from its beginning
                    done = 0
                total = done + int(reply.headers.get("Content-Length", 0))
                with open(part, "ab" if done else "wb") as file, tqdm(
                        total=total, initial=done, unit="B", unit_scale=True, desc=path.name,
                        disable=None) as bar:
                    while chunk := reply.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
            if part.stat().st_size < total:
                raise ConnectionError(f"the connection broke at {part.stat().st_size} of {total} "
                                      f"bytes")
    except urllib.error.HTTPError as error:
        if error.code == 416:           # nothing left to send, and yet the SHA-256 was wrong
            part.unlink(missing_ok=True)
        raise Missing(f"{address} could not be downloaded ({error}); download it by hand to "
                      f"{path}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Missing(f"{address} could not be downloaded ({error}); run the command again to "
                      f"continue, or download it by hand to {path}") from error
    if sha256(part) != digest:
        part.unlink()
        raise Missing(f"the download of {address} was damaged and has been removed; run the "
                      f"command again")
    os.replace(part, path)
    return path


# ------------------------------------------------------------------------------------------ weights

def read_tensors(path: str | os.PathLike) -> object:
    """What torch.save wrote: tensors and plain values.

    Nothing in the file is executed, a changed bit is detected, and reading takes no more memory
    than twice the size of the file. Mistake for anything else."""
    try:
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, size)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if _bytes_of(content, set()) > 2 * size:        # views may share one storage
            raise ValueError("its tensors claim more memory than the file has bytes")
    except OSError:
        raise
    except Exception as error:  # torch raises a dozen types for a damaged or hostile file
        raise Mistake(f"{path} is not a valid weight file: {reason(error)}") from error
    return content


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """ValueError for what torch.save never writes and torch.load does not notice."""
    parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("it is compressed, which torch.save never does")
    if any(part.volume or part.internal_attr or part.external_attr for part in parts):
        raise ValueError("its zip directory was not written by torch.save")     # torch misreads it
    if sum(part.file_size for part in parts) > size:
        raise ValueError("its parts are larger than the whole file")
    if damaged := archive.testzip():                    # torch does not compare checksums
        raise ValueError(f"{damaged} in it is damaged")
    for part in parts:
        if part.filename.endswith("data.pkl") and any(
                "bytearray" in str(argument) for _, argument, _
                in pickletools.genops(archive.read(part))):
            raise ValueError("it allocates memory for data that it does not contain")


def _bytes_of(content: object, seen: set[int]) -> int:
    """Memory of all tensors if copied: a stride of 0 lets a small file claim any shape."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if not isinstance(content, (dict, list, tuple)) or id(content) in seen:
        return 0
    seen.add(id(content))
    values = content.values() if isinstance(content, dict) else content
    return sum(_bytes_of(value, seen) for value in values)
