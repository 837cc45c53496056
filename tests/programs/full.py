"""Runs train.py on a "disk" that is full after N bytes of last.pt: full.py N [options]."""
import resource
import signal
import sys

from support import files

most = int(sys.argv.pop(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)           # write() then fails with "File too large"
save = files.save


def save_on_full_disk(path, content) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if path.name == "last.pt" else -1, -1))
    save(path, content)


files.save = save_on_full_disk
import train                                                            # noqa: E402

train.main()
