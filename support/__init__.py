"""What every command needs and no reader of the paper does.

    text        printing: safe text, tables
    errors      `Mistake`, and how a command ends
    options     a Config as command-line options
    files       files that are either complete or absent; downloads; weights read safely
    parallel    devices, and many processes that train as one
    loading     batches, read by worker processes
    progress    a run in a folder: resume, signals, log, progress bar
    generated   events.json and chunks.json of a generated dataset
    results     kept results of long computations
    distilbert  DistilBERT, a text tower that is not a CLIP's
    cropped     the convolutions of mmn.py, faster

Nothing here imports anything from outside this folder.
"""
from support import errors                      # first of all: see errors.leave_quietly
