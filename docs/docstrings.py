"""Has docstrings, which are written for Python's own help, appear in the site: examples as code, names as names."""

import re

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr):`~?(?:[\w.]+\.)?(\w+)`")
EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).*)*", re.MULTILINE)  # up to an empty line


class Docstrings(griffe.Extension):
    """Fences the examples of every docstring and turns :class:`~engram_kernels.Name` into `Name`."""

    def on_object(self, *, obj: griffe.Object, **arguments) -> None:
        """Changes an object's docstring."""
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(lambda example: f"```pycon\n{example[0]}\n```", text)
