"""What mkdocs does beside the pages in docs/: README.md as the home page, files of the repository that pages link to,
and LaTeX as MathML, which a browser draws without scripts, fonts or network."""

import html
import posixpath
import re
from pathlib import Path

import math_core
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]  # beside those in docs/
LINK = re.compile(r'(\]\(|\b(?:src|href)=")([^\s)"#:]+)')
LATEX = math_core.LatexToMathML()


def in_site(path: str) -> str:
    """Where a file of the repository stands in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def in_repository(src_uri: str) -> str:
    if src_uri == "index.md":
        return "README.md"
    return src_uri if (ROOT / src_uri).is_file() else f"docs/{src_uri}"


def linked(path: str, target: str) -> str:
    """The path in the repository of what the page at `path` links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def on_files(files, config):
    """Pages outside docs/ join the site, and so does every file that a page links to."""
    queue = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for path in queue:  # which grows meanwhile
        if files.get_file_from_path(in_site(path)) is None:
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            targets = [linked(path, match[2]) for match in LINK.finditer((ROOT / path).read_text())]
            queue += [target for target in targets if (ROOT / target).is_file() and target not in queue]
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between files of the repository become links within the site; a link to a folder becomes its text."""
    path = in_repository(page.file.src_uri)

    def moved(match):
        target = linked(path, match[2])
        if not (ROOT / target).is_file():
            return match[0]
        return match[1] + posixpath.relpath(in_site(target), posixpath.dirname(page.file.src_uri) or ".")

    def unlinked(match):
        return match[1] if (ROOT / linked(path, match[2])).is_dir() else match[0]

    return re.sub(r"\[([^\]]+)\]\(([^\s)#:]+)\)", unlinked, LINK.sub(moved, markdown))


def on_page_content(content, page, config, files):
    """What pymdownx.arithmatex found, \\(...\\) in a span or \\[...\\] in a div, becomes MathML."""

    def mathml(match):
        latex = html.unescape(match[2]).strip()[2:-2]
        try:
            return LATEX.convert_with_local_state(latex, displaystyle=match[1] == "div")
        except math_core.LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {latex.strip()}: {error}") from error

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', mathml, content, flags=re.DOTALL)
