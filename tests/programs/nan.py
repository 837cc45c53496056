"""Runs train.py with nan for the features of the first video of every full batch of 4."""
import data
import train

collate = data.Videos.collate


def broken(self, items):
    batch = collate(self, items)
    if len(items) == 4:
        batch.frames[0] = float("nan")
    return batch


data.Videos.collate = broken
train.main()
