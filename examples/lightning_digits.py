"""Train binary layers with PyTorch Lightning, in one process or in several that share each batch.

    pip install 'engram-kernels[train]' lightning
    python examples/lightning_digits.py [PROCESSES]

Lightning's sampler gives a process every W-th sample of a batch, W processes in all. Engrams are drawn by a sample's
number in the batch, so that the processes draw what one process would have drawn.
"""

import sys

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import engram_kernels as ek


class Digits(lightning.LightningModule):
    """Two binary layers; the second sees a tenth of the hidden units, drawn for every sample."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            ek.BinaryEngramLinear(64, 512, binary_input=False),
            nn.LayerNorm(512),
            ek.BinaryEngramLinear(512, 10, engram=ek.StochasticEngram(rate=0.1, temperature=0.5), ste_window=torch.inf),
        )

    def training_step(self, batch, _):
        """The loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def test_step(self, batch, _):
        """Logs the accuracy, without noise in the engrams."""
        x, y = batch
        self.log("accuracy", (self.network(x).argmax(dim=1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        """Metaplastic for the hidden weights, Adam for the norm."""
        return ek.MetaplasticAdam(self.parameters(), lr=5e-3, metaplasticity=1.35)


if __name__ == "__main__":
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 8 - 1, dtype=torch.float32), torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1500, 297])
    options = {"accelerator": "cpu", "devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    trainer = lightning.Trainer(**options, max_epochs=10, logger=False, enable_checkpointing=False)
    model = Digits()
    trainer.fit(model, DataLoader(train, batch_size=100 // processes, shuffle=True))
    accuracy = trainer.test(model, DataLoader(test, batch_size=297), verbose=False)[0]["accuracy"]
    print(f"accuracy {accuracy:.1%}")
