"""Plumbing that every command shares; skip it on a first reading.

    text        printing: safe text, tables
    errors      `Mistake`, and how a command ends
    options     a Config as command-line options
    files       files that are either complete or absent; downloads; weights read safely
    parallel    devices, and several processes that train as one
    loading     batches, read by worker processes
    progress    a run in a folder: resume, log, progress bar
    cropped     the convolutions of mmn.py, faster
    untrained   the score of CLIP alone, and its fusion with a trained one
    distilbert  DistilBERT as a text tower

Nothing here imports anything from outside this folder.
"""
