"""Train binary layers with the Trainer of Hugging Face, and keep the network as one of its folders.

    pip install 'engram-kernels[train]' transformers accelerate
    python examples/trainer_digits.py DIR

DIR gets config.json and model.safetensors, which `ek.from_pretrained(DIR)` reads.
"""

import sys
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

import engram_kernels as ek


class WithLoss(nn.Module):
    """What Trainer asks of a model: labels in, loss and logits out."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, labels):
        """Floats (M, 64), labels int64 (M,)."""
        logits = self.network(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


set_seed(0)
digits = load_digits()
samples = [
    {"x": torch.tensor(x, dtype=torch.float32), "labels": int(y)}
    for x, y in zip(digits.data / 8 - 1, digits.target, strict=True)
]
network = nn.Sequential(
    ek.BinaryEngramLinear(64, 512, binary_input=False),
    nn.LayerNorm(512),
    ek.BinaryEngramLinear(512, 10, engram=ek.StochasticEngram(rate=0.1, temperature=0.5), ste_window=torch.inf),
)
with tempfile.TemporaryDirectory() as logs:
    settings = TrainingArguments(
        logs, num_train_epochs=10, per_device_train_batch_size=100, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = Trainer(
        WithLoss(network),
        settings,
        train_dataset=samples[:1500],
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(1) == result.label_ids).mean())},
        optimizers=(ek.MetaplasticAdam(network.parameters(), lr=5e-3, metaplasticity=1.35), None),
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate(samples[1500:])['eval_accuracy']:.1%}")
ek.save_pretrained(network, sys.argv[1])
