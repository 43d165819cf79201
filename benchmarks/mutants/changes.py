"""The small faults that can be put into a piece of Python: where, and what stands there instead.

A change is text: the characters from ``start`` to ``end`` of a file are replaced. Nothing is changed in docstrings,
annotations, decorators, messages of errors and warnings, imports, ``__all__`` and what only tunes speed.
"""

from __future__ import annotations

import ast
import dataclasses
import warnings
from collections.abc import Iterator

COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
# Methods that give their object back in another form, order or storage: dropped, the object itself stays.
FORMS = frozenset(
    "float double half to type_as contiguous clone detach abs neg flip cumsum transpose mT sort roll clamp "
    "clamp_min clamp_max masked_fill index_select gather copy logical_not long int bool exp log sqrt rsqrt softmax "
    "logsumexp".split()
)
# Functions of which the first argument stays.
WRAPPERS = frozenset(
    "cast flip cumsum abs maximum minimum max min clamp trans sorted list reversed masked_fill exp log sigmoid "
    "logsigmoid softmax relu where stack".split()
)
TUNING = frozenset("num_warps num_stages maxnreg BLOCK_T BLOCK_N BLOCK_M key prune_configs_by reset_to_zero".split())
SILENT = frozenset("warn warning info debug print warn_once warning_once".split())


@dataclasses.dataclass(frozen=True)
class Change:
    """One small fault.

    file: from the project's root. start, end: characters of the file. line: of the file, from 1. kind: which sort of
    change. old, new: the text that is replaced, and what stands there instead. within: the function, and the line with
    the change marked in it: what still names the change when lines above it came or went.
    """

    file: str
    start: int
    end: int
    line: int
    kind: str
    old: str
    new: str
    within: str

    @property
    def name(self) -> str:
        return f"{self.file}::{self.within}"

    def apply(self, text: str) -> str:
        """The file's text with this fault.

        Raises:
            ValueError: the text at this place is another one: the file changed since the change was drawn.
        """
        if text[self.start : self.end] != self.old:
            raise ValueError(f"{self.file}:{self.line}: holds {text[self.start : self.end]!r}, wanted {self.old!r}")
        return text[: self.start] + self.new + text[self.end :]


def short(text: str) -> str:
    """On one line, at most 60 characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


def changes(file: str, text: str) -> list[Change]:
    """Every change of a file, in the order of the places; not all of them compile."""
    return sorted(Finder(file, text).all(), key=lambda change: (change.start, change.end, change.kind, change.new))


def again(old: Change, text: str) -> Change | None:
    """The same change of a file that has changed since, the nearest of those with its name; None: its line is gone."""
    same = [change for change in changes(old.file, text) if (change.name, change.kind) == (old.name, old.kind)]
    return min(same, key=lambda change: abs(change.line - old.line), default=None)


def compiles(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "changed", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


class Finder:
    """Walks the tree of one file; ``starts`` holds the number of characters before each line."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.lines = text.splitlines(keepends=True)
        self.scope: list[str] = []
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def place(self, line: int, byte: int) -> int:
        """ast counts bytes of UTF-8; the text is characters."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:byte].decode())

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)

    def source(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def change(self, kind: str, start: int, end: int, new: str) -> Change:
        line = self.text.count("\n", 0, start) + 1
        old = self.text[start:end]
        before = self.text[self.starts[line - 1] : start].lstrip()
        after = self.text[end:].partition("\n")[0].partition("  #")[0]
        within = f"{'.'.join(self.scope)}: {before}[[{short(old)} -> {short(new)}]]{after}"
        return Change(self.file, start, end, line, kind, old, new, within)

    def all(self) -> Iterator[Change]:
        yield from self.below(ast.parse(self.text))

    def below(self, node: ast.AST) -> Iterator[Change]:
        name = node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
        if name:
            self.scope.append(name)
        for child in children(node):
            yield from self.here(child)
            yield from self.below(child)
        if name:
            self.scope.pop()

    def here(self, node: ast.AST) -> Iterator[Change]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from self.between("comparison", node.left, node.comparators[0], COMPARISONS[type(node.ops[0])])
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield from self.between("operator", node.left, node.right, (OPERATORS[type(node.op)],))
        elif isinstance(node, ast.BoolOp):
            other = "or" if isinstance(node.op, ast.And) else "and"
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from self.between("and, or", left, right, (other,))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            yield self.change("sign", *self.span(node), self.source(node.operand))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield self.change("by one", *self.span(node), str(node.value + 1))
            if node.value > 0:
                yield self.change("by one", *self.span(node), str(node.value - 1))
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield self.change("switch", *self.span(node), str(not node.value))
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            if not isinstance(node, ast.While):
                yield self.change("always", *self.span(node.test), "True")
            yield self.change("never", *self.span(node.test), "False")
        elif isinstance(node, ast.Call):
            yield from self.call(node)
        elif isinstance(node, ast.AugAssign | ast.Expr) and not isinstance(getattr(node, "value", None), ast.Yield):
            yield self.change("drop", *self.span(node), "pass")

    def between(self, kind: str, left: ast.expr, right: ast.expr, new: tuple[str, ...]) -> Iterator[Change]:
        """The operator between two expressions, brackets and comments around it left alone."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.text[start:end]
        first = next((i for i, letter in enumerate(gap) if letter not in " \n\t()"), None)
        if first is None or "#" in gap:
            return
        last = max(i for i, letter in enumerate(gap) if letter not in " \n\t(")
        for operator in new:
            yield self.change(kind, start + first, start + last + 1, operator)

    def call(self, node: ast.Call) -> Iterator[Change]:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        module = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") in {
            "torch",
            "tl",
            "F",
            "math",
        }
        if isinstance(function, ast.Attribute) and not module and name in FORMS:
            yield self.change("drop form", *self.span(node), self.source(function.value))
        elif name in WRAPPERS and len(node.args) > (1 if name == "where" else 0):
            kept = node.args[1:] if name == "where" else node.args[:1]
            for argument in kept:
                yield self.change("drop form", *self.span(node), f"({self.source(argument)})")
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in TUNING:
                continue
            if keyword.arg == "mask" or isinstance(keyword.value, ast.Name | ast.Attribute):
                start, end = self.span(keyword)
                rest = self.text[end:].lstrip()
                if rest.startswith(","):
                    end = self.text.index(",", end) + 1
                yield self.change("drop argument", start, end, "")


def children(node: ast.AST) -> Iterator[ast.AST]:
    """What is code of a node: no docstrings, annotations, decorators, messages, imports."""
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    if isinstance(node, ast.Call):
        function = node.func
        if (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")) in SILENT:
            return
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith("__"):
        return
    skipped = {"annotation", "returns", "decorator_list", "type_params"}
    for field, value in ast.iter_fields(node):
        if field in skipped:
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or is_text(child) or is_silent(child):
                continue
            yield child


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_silent(node: ast.AST) -> bool:
    """A statement that only speaks: not dropped either."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    function = node.value.func
    return (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")) in SILENT
