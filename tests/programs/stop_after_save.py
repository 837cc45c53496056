"""Runs train.py and exits with status 1 once last.pt holds N epochs: FILE N [options]."""
import sys

from support import files
import train

save_tensors, epochs = files.save_tensors, int(sys.argv.pop(1))


def save_and_stop(path, content) -> None:
    save_tensors(path, content)
    if path.name == "last.pt" and content["epoch"] == epochs:
        raise SystemExit(1)


files.save_tensors = save_and_stop
train.main()
