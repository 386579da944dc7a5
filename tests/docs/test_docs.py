"""Generated pages hold what the code has; the README and the front page show code that runs."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.main import get_command

import lmcache
from lmcache.cli import app
from lmcache.config import Config
from lmcache.observe.metrics import MISS_REASONS, Metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _page(hooks: ModuleType, name: str) -> str:
    text: str = hooks.on_page_markdown((ROOT / "docs" / name).read_text())
    assert "<!-- generated" not in text
    return text


def test_the_configuration_page_has_every_setting_with_default_unit_variable_and_meaning(hooks: ModuleType) -> None:
    page = _page(hooks, "configuration.md")
    sections = dict(re.findall(r"### `(\w+)`\n(.*?)(?=\n### |\Z)", page, re.DOTALL))
    assert list(sections) == [s.name for s in Config.settings()]
    for setting in Config.settings():
        text = sections[setting.name]
        assert setting.doc in text
        assert setting.doc.endswith(".")
        assert f"`LMCACHE_{setting.name.upper()}`" in text
    assert "default `256` · in tokens" in sections["chunk_tokens"]
    assert "default `nothing`" in sections["disk_path"]
    assert '`"canonical"` | `"native"` · default `canonical`' in sections["disk_order"]
    assert "default `false`" in sections["strict"]


def test_the_command_page_has_every_command_and_option(hooks: ModuleType) -> None:
    page = _page(hooks, "cli.md")
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## `lmcache {name}`" in page
        for parameter in command.params:
            shown = [] if getattr(parameter, "hidden", False) else parameter.opts
            assert all(option in page for option in shown if option.startswith("--"))
    assert "\x1b" not in page


def test_the_metrics_page_has_every_metric_and_miss_reason(hooks: ModuleType) -> None:
    page = _page(hooks, "metrics.md")
    families = Metrics().families
    assert {f.name.removesuffix("_total") for f in families} == {f.name for f in Metrics().registry.collect()}
    for family in families:
        assert f"| `{family.name}` | {family.kind} |" in page
    for reason in MISS_REASONS:
        assert f"| `{reason}` |" in page


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = {page for entry in nav for page in entry.values()}
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_links_between_files_of_the_repository_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("adapters/*/*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_code_on_front_pages_parses_and_imports_names_that_exist(page: str) -> None:
    snippets = _snippets(page)
    assert snippets
    for snippet in snippets:
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module == "lmcache":
                for alias in node.names:
                    assert getattr(lmcache, alias.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Config":
                Config(**{k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg})
