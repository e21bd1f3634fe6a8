"""Which files of the package import which, anywhere in them: inside functions and for types too."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "lorasurgery"
FILES = sorted(PACKAGE.rglob("*.py"))


def circles() -> list[list[str]]:
    """Groups of files that import one another, inside functions too (Tarjan's strongly connected components)."""
    graph = {module_of(path): imports_of(path) - {module_of(path)} for path in FILES}
    found, index, low, stack = list[list[str]](), dict[str, int](), dict[str, int](), list[str]()

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The package's modules that a file imports anywhere, but for what a package's __init__ offers lazily."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{a.name}" for a in node.names}
            found |= {n if n in MODULES else node.module for n in inner}
    return found & MODULES


MODULES = {module_of(path) for path in FILES}
