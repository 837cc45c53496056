"""Beside the paper: everything that neither training nor evaluation needs. `python -m extras.NAME`.

    walk        the equations on a small example
    prepare     annotations and features of a dataset (the command of data.py)
    index       an index over a folder of videos; search: by sentences; serve: in a browser
    show        what retrieve.py found: text, json, plot, page, clips
    zero_shot   CLIP alone, without training: its evaluation
    reproduce   every table and figure of the paper, ours beside the paper's
    probe       what CLIP's features contain; figures: what reproduce draws
    qvhighlights  scores of predictions in QVHighlights' form (in evaluate.py's command)
    bench       speed, in ratios, on the CPU or a GPU
"""
