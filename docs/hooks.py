"""Brings files outside of docs/ that pages link to into the site, so that links hold in the repository and there."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = "repository/"  # where they lie in the site, by their path in the repository
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")


def _in_repository(uri: str) -> str:
    """The path of a file of the site in the repository."""
    return uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}"


def _in_site(path: str) -> str:
    """The path of a file of the repository in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path


def _targets(uri: str, text: str) -> dict[str, str]:
    """For every link of a page to a file of the repository, the file's path there."""
    folder = posixpath.dirname(_in_repository(uri))
    paths = {link: posixpath.normpath(posixpath.join(folder, link)) for link in LINK.findall(text)}
    return {link: path for link, path in paths.items() if (ROOT / path).is_file()}


def on_files(files: Files, config) -> Files:
    """Adds what pages link to, and what those link to."""
    pending = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while pending:
        for path in _targets(*pending.pop()).values():
            if files.get_file_from_path(_in_site(path)) is None:
                files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
                if path.endswith(".md"):
                    pending.append((_in_site(path), (ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Has links lead to where their files lie in the site."""
    uri = page.file.src_uri
    targets = _targets(uri, markdown)

    def moved(link: re.Match[str]) -> str:
        path = targets.get(link[0])
        return link[0] if path is None else posixpath.relpath(_in_site(path), posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)
