"""Optional dependencies, which training from the command line needs and the operators do not."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRA = "engram-kernels[train]"


class MissingExtraError(ImportError):
    """A package of the extra ``train`` (scikit-learn, safetensors, matplotlib, tqdm) is needed and absent."""


def require(module: str, package: str, purpose: str) -> ModuleType:
    """Import ``module`` where it is used, so that importing this package never pays for it.

    Raises:
        MissingExtraError: names the package, its purpose and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{purpose} needs {package}, which is missing: pip install '{EXTRA}'") from error
