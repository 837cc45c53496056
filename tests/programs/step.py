"""One step of train.py for several configurations and batches; saves the terms of Eq. 11, all
gradients and BatchNorm's statistics: step.py ROOT OUT training|evaluation (also by torchrun)."""
import sys

import torch

import clip
import data
import train
from support import parallel

root, out, training = sys.argv[1], sys.argv[2], sys.argv[3] == "training"
CASES = ((6, {}), (5, dict(sequence="lstm", layers=4, context_query="none")), (1, {}),
         (1, dict(sequence="lstm")))

torch.set_num_threads(1)
results = {}
with parallel.processes(torch.device("cpu")):
    for count, changes in CASES:
        config = train.Config(**{"dataset": "shapes", **train.preset("shapes"), "root": root,
                                 "method": "vdi", "lambda_sd": 1.0, **changes})
        store = data.open_store("shapes", "shapes", root)
        videos = data.Videos(data.read_annotations("shapes", "train", root), store, 16,
                             data.parser_of("shapes", root), True)
        torch.manual_seed(0)
        text = clip.build_text(clip.read_state(f"{root}/shapes/clip.pt"))
        model = train.Model(config, text, store.manifest).train(training)
        batch = next(iter(videos.batches(count, torch.Generator().manual_seed(5))))
        terms = train.terms(model, batch, config)
        train.total_loss(terms, config, 0).backward()
        parallel.sum_gradients(model)
        results[f"{count} {changes}"] = {
            "videos": batch.videos, "terms": terms,
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "statistics": {name: b for name, b in model.named_buffers() if "running" in name}}
    if parallel.rank() == 0:
        torch.save(results, out)
    print("printed by", parallel.rank())
