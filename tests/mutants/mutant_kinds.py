"""The small mistakes that are put into the code, each as a change of a few characters of one function.

Names, annotations, decorators, defaults, docstrings and f-strings stay as they are: a mistake there is no statement's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BODIES = ("body", "orelse", "finalbody")
_UNTOUCHED = {"annotation", "returns", "decorator_list", "args"}  # of a statement or a lambda


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Args:
        file: From the root of the checkout. kind: Of mistake. function: Its name, with its class's.
        line: Of the first character that changes. start, end: The bytes that `text` takes the place of.
        was, now: The lines concerned before and after, without what surrounds them. same: How many mutants of the
            function before this one look just so.
        statement: Where the statement begins, so that whoever runs it can be seen.
    """

    file: str
    kind: str
    function: str
    line: int
    start: int
    end: int
    text: str
    was: str
    now: str
    same: int
    statement: tuple[int, int]

    def applied(self, source: bytes) -> bytes:
        """The file with the mistake in it."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants(file: str, source: bytes) -> list[Mutant]:
    """Every mutant of a file's functions, in the order of the text.

    >>> [m.now for m in mutants("f.py", b"def f(a):\\n    return a < 1\\n")]
    ['return None', 'return a <= 1', 'return a >= 1', 'return a < 2', 'return a < 0']
    """
    found: list[Mutant] = []
    counts: dict[tuple[str, ...], int] = {}
    text = _Text(source)
    for name, function in _functions(ast.parse(source), ""):
        for kind, statement, start, end, new in _changes(function, text):
            was, now = text.lines(start, end, new)
            key = (name, kind, was, now)
            same = counts.get(key, 0)
            counts[key] = same + 1
            line = source.count(b"\n", 0, start) + 1
            where = (statement.lineno, statement.col_offset)
            found.append(Mutant(file, kind, name, line, start, end, new, was, now, same, where))
    return found


class _Text:
    """Bytes by line and column, as ast counts them."""

    def __init__(self, source: bytes) -> None:
        self.source, self._starts = source, [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self._starts[node.lineno - 1] + node.col_offset,
            self._starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def lines(self, start: int, end: int, new: str) -> tuple[str, str]:
        """The whole lines that a change concerns, before and after, on one line each; a word alone with the line before."""
        first, last = self.source.rfind(b"\n", 0, start) + 1, self.source.find(b"\n", end)
        last = len(self.source) if last < 0 else last
        if b" " not in self.source[first:last].strip():
            first = self.source.rfind(b"\n", 0, max(0, first - 1)) + 1
        before = self.source[first:last].decode()
        after = self.source[first:start].decode() + new + self.source[end:last].decode()
        return " ".join(before.split()), " ".join(after.split())


Change = tuple[str, ast.stmt, int, int, str]


def _functions(tree: ast.AST, inside: str) -> Iterator[tuple[str, _Function]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _DEFINITIONS):
            name = f"{inside}{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield name, node
            yield from _functions(node, f"{name}.")
        else:
            yield from _functions(node, inside)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a function, not those of functions inside it."""
    for statement in body:
        yield statement
        if isinstance(statement, _DEFINITIONS):
            continue
        for name in _BODIES:
            yield from statements(getattr(statement, name, []))
        for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from statements(part.body)


def _changes(function: _Function, text: _Text) -> Iterator[Change]:
    docstring = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if docstring else function.body
    if len(body) > 1 and not isinstance(body[0], _DEFINITIONS):
        start, _ = text.span(body[0])
        yield "early return", body[0], start, start, "return None\n" + " " * body[0].col_offset
    for statement in statements(body):
        if isinstance(statement, _DEFINITIONS):
            continue
        for kind, node, new in _of_statement(statement):
            yield kind, statement, *text.span(node), new
        if isinstance(statement, ast.Raise):
            continue  # what it says is for people
        for expression in _expressions(statement):
            for kind, new in _of_expression(expression):
                yield kind, statement, *text.span(expression), new


def _expressions(statement: ast.AST) -> Iterator[ast.expr]:
    """The expressions of a statement, outer ones first, without those of the statements in it."""
    for name, value in ast.iter_fields(statement):
        if name in _UNTOUCHED and not (name == "args" and isinstance(statement, ast.Call)):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, (ast.stmt, ast.ExceptHandler, ast.match_case, ast.JoinedStr)):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: a guard that never acts
                continue
            if isinstance(node, ast.expr):
                yield node
            if isinstance(node, ast.AST):
                yield from _expressions(node)


def _of_statement(node: ast.stmt) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call removed", node, "pass"
    elif isinstance(node, ast.Raise):
        yield "raise removed", node, "pass"
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield "loop", node, "continue" if isinstance(node, ast.Break) else "break"
    elif isinstance(node, ast.Return) and not _is_nothing(node.value):
        yield "return None", node, "return None"
    elif isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
        new = ast.AugAssign(node.target, _ARITHMETIC[type(node.op)](), node.value)
        yield "arithmetic", node, ast.unparse(new)
    if isinstance(node, (ast.If, ast.While)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield "condition", node.test, f"not ({ast.unparse(node.test)})"


def _is_nothing(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and not value.value)


def _of_expression(node: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Compare):
        for operator in _COMPARE[type(node.ops[0])]:
            yield "comparison", ast.unparse(ast.Compare(node.left, [operator(), *node.ops[1:]], node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield "arithmetic", f"({ast.unparse(ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "boolean", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.IfExp):
        yield "condition", f"({ast.unparse(ast.IfExp(node.test, node.orelse, node.body))})"
    elif isinstance(node, ast.Constant):
        yield from (("constant", text) for text in _of_constant(node.value))
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.Slice):
        yield from _of_slice(node)


def _of_constant(value: object) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (repr(not value),)
    if isinstance(value, (int, float)):
        return repr(value + 1), f"({value - 1!r})" if value < 1 else repr(value - 1)
    if isinstance(value, str):
        return ("''" if value else "'x'",)
    return ()


def _of_call(node: ast.Call) -> Iterator[tuple[str, str]]:
    if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "getattr", "hasattr"):
        return  # a TypeError at once, which proves nothing
    for i, (one, other) in enumerate(zip(node.args, node.args[1:], strict=False)):
        starred = isinstance(one, ast.Starred) or isinstance(other, ast.Starred)
        if not starred and ast.dump(one) != ast.dump(other):
            swapped = [*node.args[:i], other, one, *node.args[i + 2 :]]
            yield "arguments", ast.unparse(ast.Call(node.func, swapped, node.keywords))


def _of_slice(node: ast.Slice) -> Iterator[tuple[str, str]]:
    """Without one of its bounds, or one place further."""
    for name in ("lower", "upper"):
        bound = getattr(node, name)
        if bound is None:
            continue
        for new in (None, ast.BinOp(bound, ast.Add(), ast.Constant(1))):
            parts = {"lower": node.lower, "upper": node.upper, "step": node.step} | {name: new}
            yield "slice", ast.unparse(ast.Slice(**parts))
