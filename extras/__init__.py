"""Beside the paper: everything that neither training nor evaluation needs. `python -m extras.NAME`.

    prepare       annotations and features of a dataset (the command of data.py)
    features      features of many videos: extracted, or made elsewhere
    qvhighlights  scores of any system's predictions (evaluate.py --truth)
    zero_shot     CLIP alone, without training
    index         an index over a folder of videos; search: by sentences; serve: in a browser
    show          the answers of retrieve.py: text, JSON, plot, page, clips
    reproduce     every table and figure of the paper (figures, probe)
    bench         speed, in ratios, on the CPU or a GPU
"""
