"""MkDocs hooks: pages link to files of the repository, which are not part of the site.

Figures and tables of `experiments/results` are added to the site; links to any other file become plain text.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in {".png", ".csv"}:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    del page, config, files

    def replace(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path = Path(target)
        if path.parent.name == RESULTS.name and path.suffix in {".png", ".csv"}:
            return f"{image}[{text}](results/{path.name})"
        return text

    return LINK.sub(replace, markdown)
