"""Everything that the pages name exists: files, links, sections, benchmarks, targets of make, options of commands."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.__main__ import SUBCOMMANDS
from normbt_kernels.commands import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("bench/*.md"))]
FOLDERS = [path.name for base in (ROOT, ROOT / "normbt_kernels") for path in base.iterdir() if path.is_dir()]

CODE = ("normbt_kernels", "tests", "bench", "reference")


def anchors(text):
    """The names by which GitHub and mkdocs link to the headings of a page."""
    titles = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles}


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked.read_text()), f"{target}#{anchor}"


def test_paths_exist(page):
    """Paths in backticks are seen from the root, from the package, or from the page's own folder."""
    for path in re.findall(r"`([\w./*-]+/[\w./*-]*)`", page.read_text()):
        if path.partition("/")[0] in FOLDERS:
            found = [match for base in (ROOT, ROOT / "normbt_kernels", page.parent) for match in base.glob(path)]
            assert found, path


def test_files_that_contributing_names_alone_exist():
    for name in re.findall(r"`([\w-]+\.(?:py|toml|md|yml))`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / name).is_file() or any(any((ROOT / folder).rglob(name)) for folder in CODE), name


def test_benchmarks_and_make_targets_exist(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for name in re.findall(r"python -m bench ([a-z][\w-]*)", text):
        assert name in SUBCOMMANDS, name
    for name in re.findall(r"python -m (bench\.\w+)", text):
        assert find_spec(name), name
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_site_lists_every_page():
    listed = re.findall(r"^ +- (?:\w+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert set(listed) == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def commands():
    """Every `normbt` command of every page, in one line, but those of a shell loop, which test_reproduce.py runs."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            for line in re.findall(r"^normbt .*", block.replace("\\\n", " "), flags=re.MULTILINE):
                yield line.partition("  #")[0]


@pytest.mark.parametrize("line", sorted({line for line in commands() if "$" not in line}))
def test_commands_know_all_that_they_are_given(line, monkeypatch, capsys, tmp_path):
    """A command that needs a model or a data set of the reader's is only parsed."""
    _, name, *words = line.split()
    monkeypatch.chdir(tmp_path)
    for needs in ("evaluate", "diagnose", "export"):
        monkeypatch.setattr(cli, f"_{needs}", lambda arguments, others: print(arguments) or 0)
    assert cli.main([name, *words, *(["--help-trainer"] if name == "train" else [])]) == 0
    assert capsys.readouterr().out
