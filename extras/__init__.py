"""Beside the paper: everything that neither training nor evaluation needs. `python -m extras.NAME`.

    walk        the equations on a small example, what a video or an image looks like to CLIP
    prepare     annotations and features of a dataset (the command of data.py)
    index       an index over a folder of videos; search: by sentences; serve: in a browser
    show        what retrieve.py found: text, json, plot, page, clips
    zero_shot   CLIP alone, without training: a row of the evaluation
    tan         2D-TAN, a second retriever
    probe       what CLIP's features and Eq. 3-5 contain
    reproduce   every table and figure (figures), ours beside the paper's; tables.json: their rows
    readings    other literal readings of Eq. 1-5; rehearsal: every table without the videos
    bench       speed, in ratios; gpu_day: what to run first on a GPU
"""
