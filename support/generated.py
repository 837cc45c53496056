"""What a generated dataset, such as the shapes world, knows about itself: its events and chunks."""
import json
import os
import pathlib
from typing import NamedTuple

from support.errors import Mistake


class Event(NamedTuple):
    """What happens in a video of the shapes world: who does what, when."""
    start_sec: float
    end_sec: float
    noun: str
    verb: str


def read_events(dataset: str, root: str | os.PathLike) -> dict[str, list[Event]] | None:
    """All events of each video, if the dataset knows them (events.json), else None."""
    path = pathlib.Path(root) / dataset / "events.json"
    if not path.exists():
        return None
    return {name: [Event(*event) for event in events]
            for name, events in read_dict(path).items()}


def read_dict(path: pathlib.Path) -> dict:
    """A json file of a dataset that shapes.py built. Mistake if it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise Mistake(f"{path} is damaged ({error}); remove its folder and build it "
                      f"again") from error
