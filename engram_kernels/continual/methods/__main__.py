"""``python -m engram_kernels.continual.methods`` prints the table of hyper-parameters for the documentation."""

from ..parameters import markdown_table
from . import METHODS

print(markdown_table({name: preset.config for name, preset in METHODS.items()}), end="")
