"""CLIP2Video: which of many videos does a sentence describe? (Fang et al., 2021, arXiv 2106.11097.)

    python -m clip2video train                                  # the shapes world, in minutes
    python -m clip2video train --train-images true --out DIR    # with the image tower
    python -m clip2video prepare msrvtt --annotations DIR --videos DIR
    python -m clip2video train --dataset msrvtt --device cuda
    python -m clip2video evaluate runs/clip2video/shapes-both/ckpt.pt
    python -m clip2video index CKPT DIR --out index/            # a folder of videos
    python -m clip2video search index/ "a red circle rises"

Each video and each sentence becomes two unit vectors. For the global one, the temporal difference
block (TDB) inserts the changes between frames; for the aligned one, the temporal alignment block
(TAB) assigns frames and words to shared centres. The similarity is a weighted sum of the two
cosines. Left out: the plain and `sigmoid_mlp` differences of the release, MSR-VTT's full split, and
moments within a video, which mmn.py finds.

Files, each of which imports only from those before it: model (settings, network, loss), data
(published datasets, whole videos of a shapes world), evaluate (metrics, checkpoints), train (the
loop), search (an index of a folder of videos), __main__ (the command line).

Shapes: B videos or sentences, V videos, T texts, L frames, W words, D width of CLIP's joint space,
K centres, N tokens to aggregate. Masks [B, L] are bool, True = the frame exists. [code] marks what
follows the authors' released inference code.
"""
