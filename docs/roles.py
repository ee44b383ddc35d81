"""Has docstrings' references to names, which are written for Python's own help, appear as code in the site."""

import re

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr):`~?(?:[\w.]+\.)?(\w+)`")


class Roles(griffe.Extension):
    """Turns :class:`~engram_kernels.Name` into `Name` in every docstring."""

    def on_object(self, *, obj: griffe.Object, **arguments) -> None:
        """Changes an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
