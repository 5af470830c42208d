"""The documentation as a site: every page is in it, every link leads somewhere, and nothing comes from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "launch" / "README.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link or an anchor that leads nowhere, or a page that the menu leaves out, is an error."""
    folder = tmp_path_factory.mktemp("site")
    build(ROOT / "mkdocs.yml", folder)
    return folder


def build(config: Path, folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def html(site: Path) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_page_is_there_and_the_readme_is_first(site: Path) -> None:
    expected = {
        re.sub(r"README\.html$", "index.html", str(page.relative_to(ROOT).with_suffix(".html"))) for page in PAGES
    }
    assert set(html(site)) == {*expected, "404.html"}
    assert "Sparse updates." in html(site)["index.html"]


def test_pictures_and_style_are_there_and_none_is_from_elsewhere(site: Path) -> None:
    shown = 0
    for page, text in html(site).items():
        for link in re.findall(r'<(?:img|script|link)\b[^>]*?\b(?:src|href)="?([^"\s>]+)', text):
            if page == "404.html" and link.startswith("/"):
                link = os.path.relpath(site / link[1:], (site / page).parent)
            assert ((site / page).parent / link.split("?")[0]).is_file(), (page, link)
            shown += link.endswith((".svg", ".png"))
    assert shown > len(list(ROOT.glob("docs/images/*.svg")))
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_links_that_lead_nowhere_are_errors(tmp_path: Path) -> None:
    """To a page, to an anchor and to a file that are not in the site: each is told, and counted."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "launch").mkdir()
    for path in (ROOT / "mkdocs.yml", *PAGES):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    with (tmp_path / "docs" / "storage.md").open("a", encoding="utf-8") as page:
        page.write("\n[broken](../no-such.md) [broken](data.md#no-such) [broken](../setup.py)\n")
    with pytest.raises(AssertionError, match="Aborted with 3 warnings in strict mode") as caught:
        build(tmp_path / "mkdocs.yml", tmp_path / "out")
    for link in ("../no-such.md", "data.md#no-such", "../setup.py"):
        assert f"'{link}'" in str(caught.value)
