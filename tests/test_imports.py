"""Which module may import which, as a table; and what `import cllm` costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cllm"

# A module and the modules of CLLM that it may import, anywhere in its text. errors is open to all.
MAY_IMPORT = {
    "_core": set(),
    "arrays": {"files"},
    "_kernels": {"_core"},
    "bench": {"_kernels", "cllm", "figures", "functional", "kernels", "optim", "sweep", "tensor"},
    "checkpoint": {"arrays", "files"},
    "cli": {
        "bench", "cllm", "config", "data", "figures", "generate", "kernels", "parallel", "replay", "saved",
        "contents", "report", "status", "sweep", "train", "userfile", "files", "verify",
    },
    "contents": {"arrays", "checkpoint", "files", "guard", "progress", "records"},
    "config": {
        "data", "gpt", "guard", "kernels", "metrics", "monitor", "optim", "schedules", "task", "userfile",
    },
    "data": {"_core", "files", "kernels"},
    "errors": set(),
    "evaluation": {"data", "metrics", "task", "tensor"},
    "figures": {"records", "verdict"},
    "files": set(),
    "functional": {"_core", "kernels", "rng", "tensor"},
    "generate": {"gpt", "kernels", "rng", "tensor"},
    "gpt": {"functional", "kernels", "nn", "rng", "tensor", "userfile"},
    "guard": {"checkpoint"},
    "kernels": {"_core", "_kernels"},
    "lifecycle": {
        "checkpoint", "cllm", "config", "files", "kernels", "parallel", "progress", "records", "rng",
        "userfile",
    },
    "loop": {"arrays", "checkpoint", "lifecycle", "records", "rng", "task"},
    "metrics": {"kernels", "tensor"},
    "monitor": {"files", "kernels", "nn", "records", "tensor"},
    "nn": {"functional", "kernels", "rng", "tensor"},
    "optim": {"kernels", "parallel", "tensor", "userfile"},
    "parallel": set(),
    "parity": {"kernels", "reference"},
    "profile": {"kernels"},
    "progress": {"profile", "records"},
    "records": {"files"},
    "reference": set(),
    "replay": {"checkpoint", "data", "guard", "nn", "rng", "saved", "task", "tensor"},
    "report": {"figures", "files", "records", "sweep", "verdict"},
    "rng": set(),
    "saved": {
        "checkpoint", "config", "data", "evaluation", "gpt", "lifecycle", "metrics", "task", "userfile",
    },
    "schedules": set(),
    "status": {"config", "files", "progress", "sweep", "verdict", "watch"},
    "sweep": {
        "checkpoint", "config", "evaluation", "files", "kernels", "lifecycle", "optim", "parallel",
        "progress", "records", "saved", "schedules", "task", "train", "userfile", "verdict", "watch",
    },
    "task": {"data", "functional", "gpt", "metrics", "records", "rng", "tensor", "userfile"},
    "tensor": {"_core", "kernels", "rng"},
    "train": {
        "checkpoint", "cllm", "config", "data", "evaluation", "files", "generate", "guard", "kernels",
        "lifecycle", "loop", "metrics", "monitor", "optim", "parallel", "profile", "progress", "records",
        "rng", "saved", "schedules", "task", "userfile",
    },
    "userfile": {"files"},
    "verdict": set(),
    "verify": {"arrays", "checkpoint", "config", "parallel", "progress", "records", "train"},
    "watch": {"progress", "verdict"},
}  # fmt: skip
AT_TOP = {"numpy", "cllm", *sys.stdlib_module_names}


def module_of(path):
    """The table's name of a source file: its first part below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node):
    """Dotted names that an import statement reaches: `from cllm import x` gives cllm.x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "CLLM imports by full name"
        if node.module == "cllm":
            return [f"cllm.{alias.name}" for alias in node.names]
        return [node.module]
    return []


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if module_of(path) not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_in_the_allowed_direction(path):
    module = module_of(path)
    assert module in MAY_IMPORT, f"{module} is new: add a row to the table"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in imports(node):
            parts = name.split(".")
            if parts[0] == "cllm":
                target = parts[1] if len(parts) > 1 else "cllm"
                allowed = MAY_IMPORT[module] | {module, "errors"}
                assert target in allowed, f"line {node.lineno}: {module} may not import {target}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_large_packages_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {name.split(".")[0] for node in tree.body for name in imports(node)}
    assert names <= AT_TOP | ({"torch"} if path.name == "torch_gpt.py" else set())  # which is all about it


@pytest.mark.parametrize("module", ["cllm", "cllm.kernels", "cllm.gpt", "cllm.train", "cllm.cli"])
def test_an_import_pulls_in_no_large_package(module):
    code = (
        f"import {module}, json, sys; large = {{'scipy', 'matplotlib', 'rich', 'safetensors', 'torch'}}; "
        "print(json.dumps(sorted(large & set(sys.modules))))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == []
