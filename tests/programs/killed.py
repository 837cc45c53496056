"""Runs train.py and leaves with status 1 as soon as last.pt holds two epochs."""
from support import files
import train

save_tensors = files.save_tensors


def save_and_leave(path, content) -> None:
    save_tensors(path, content)
    if path.name == "last.pt" and content["epoch"] == 2:
        raise SystemExit(1)


files.save_tensors = save_and_leave
train.main()
