"""Who may import whom, read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for name in ("kvjax", "experiments", "configs") for path in (ROOT / name).rglob("*.py"))
MOST_LINES = 320
READ_AS_ONE = {"kvjax/primer.py"}  # a text from front to back, a third of it prose


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, module: str = "kvjax.module") -> set[str]:
    """Everything that a source imports, as dotted names; `from a import b` gives `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


DIRECT = {module_of(path): imports_of(path.read_text(), module_of(path)) for path in SOURCES}


def reached_from(module: str) -> set[str]:
    """A module, what it imports, and so on, within the project."""
    reached, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in DIRECT and name not in reached:
            reached.add(name)
            todo += [*DIRECT[name], name.rpartition(".")[0]]  # importing a.b runs a
    return reached


def below(package: str, names: set[str]) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


def test_imports_are_found():
    source = "import a.b\nfrom c import d\ndef f():\n    from .e import g\n"
    assert imports_of(source, "k.m") == {"a.b", "c", "c.d", "k.e", "k.e.g"}
    assert {"kvjax.attention.base", "kvjax.codecs.base", "kvjax.decoder", "kvjax.cache"} <= DIRECT.keys()
    assert {"kvjax.cache", "kvjax.attention.base"} <= reached_from("kvjax.decoder")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("kvjax.attention", ["kvjax.codecs", "kvjax.decoder", "kvjax.cache"]),
        ("kvjax.codecs", ["kvjax.attention", "kvjax.decoder", "kvjax.cache"]),
        ("kvjax", ["configs", "experiments"]),
    ],
)
def test_packages_do_not_reach(package, forbidden):
    """Neither directly nor through other modules of the project."""
    reached = {module: reached_from(module) | DIRECT[module] for module in below(package, set(DIRECT))}
    assert {m: found for m, names in reached.items() for f in forbidden if (found := below(f, names))} == {}


def test_nothing_unpickles_or_runs_text():
    dangerous = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert {module: names & dangerous for module, names in DIRECT.items() if names & dangerous} == {}
    calls = {
        (module_of(path), node.func.id)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
    }
    assert calls == set()


def test_flax_describes_and_plain_jax_runs():
    forbidden = {"jit", "grad", "value_and_grad", "scan", "vmap", "Optimizer", "Cache", "MultiHeadAttention"}
    used = {
        (module_of(path), node.attr)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx"
    }
    assert ("kvjax.decoder", "Module") in used
    assert {use for use in used if use[1] in forbidden} == set()
    assert not [name for names in DIRECT.values() for name in names if name.startswith("flax.nnx.")]


def test_files_are_small():
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: size for path, size in sizes.items() if size > MOST_LINES and path not in READ_AS_ONE} == {}
