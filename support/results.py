"""Results that took minutes: json files, each with the configuration that it belongs to."""
import json
import pathlib
import time

import torch

from support import files, progress


def kept(path: pathlib.Path, config: dict) -> dict | None:
    """The content of a result file, if it was made with this configuration. A field that the file
    does not have was added later."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    same = all(config.get(name) == value for name, value in content["config"].items())
    return content if same else None


def cached(path: pathlib.Path, config: dict, make, fresh: bool = False) -> dict:
    """The kept result, or else that of `make()`, a dict, which is then kept with the configuration,
    versions and minutes."""
    content = None if fresh else kept(path, config)
    if content is None:
        started = time.time()
        content = {"config": config, **make(),
                   "minutes": round((time.time() - started) / 60, 2),
                   "versions": progress.versions() | {"threads": torch.get_num_threads()}}
        text = json.dumps(content, separators=(",", ":")).replace(',"log":', ',\n"log":')
        files.save(path, text + "\n")
    return content
