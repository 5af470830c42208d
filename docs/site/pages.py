"""The site's files: where they lie in the repository, so that links between them work in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "launch/README.md", "docs/*.md")
BESIDE = ("docs/images/*.svg", "docs/images/*.png", "docs/site/*.css", "examples/*.py", "configs/**/*.yaml")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """In place of what mkdocs finds in ``docs/``; the theme's files stay."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for pattern in (*PAGES, *BESIDE):
        for path in sorted(ROOT.glob(pattern)):
            files.append(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    return files
