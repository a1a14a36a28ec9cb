"""Finds in a source whatever could turn a stranger's bytes into code, by whatever name it is called; imports nothing of it.

Names are followed through imports, assignments, getattr, sys.modules, __import__ and vars; where one is only known at run time, that is
a finding too. A name counts wherever it stands, called or handed on. Not followed: strings put together and given to other modules' code.
"""

from __future__ import annotations

import ast

# All that these modules have, but for what is named.
MODULES = {
    "pickle": {"dump", "dumps", "HIGHEST_PROTOCOL", "DEFAULT_PROTOCOL", "PickleError", "PicklingError", "UnpicklingError"},
    "marshal": {"dump", "dumps"}, "joblib": {"dump"}, "runpy": set(), "shelve": set(), "dill": {"dump", "dumps"}, "jsonpickle": set(),
    "cloudpickle": {"dump", "dumps"}, "torch.package": set(), "torch.hub": set(), "code": set(), "torch.jit": {"ignore", "is_tracing"},
}  # fmt: skip
NAMES = {
    "builtins.eval", "builtins.exec", "torch.serialization", "torch.classes", "torch.ops.load_library", "pandas.read_pickle", "yaml.load",
    "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.Loader", "yaml.FullLoader",
    "yaml.UnsafeLoader", "yaml.CLoader", "yaml.CFullLoader", "yaml.CUnsafeLoader", "yaml.loader", "yaml.constructor", "numpy.lib.format",
    "numpy.lib.npyio",
}  # fmt: skip
CALLED_SAFELY = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}  # unlike others, only where handed on
SAFE_VALUES = {"weights_only": True, "allow_pickle": False}
SAME = {"_pickle": "pickle", "cPickle": "pickle", "np": "numpy", "pd": "pandas", "__builtins__": "builtins"}
BUILTINS = ("eval", "exec", "getattr", "vars", "__import__", "globals")
WATCHED = {*MODULES, *(name.partition(".")[0] for name in (*NAMES, *CALLED_SAFELY))}


def _text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _known(name: str) -> str:
    first, dot, rest = name.partition(".")
    return SAME.get(first, first) + dot + rest


class _Names:
    """What each name of a source stands for, as a dotted path; names that are never bound stand for the module so called."""

    def __init__(self, tree: ast.AST) -> None:
        self.of = {name: name for name in (*WATCHED, *SAME, "sys", "importlib", "operator")}
        self.of |= {name: f"builtins.{name}" for name in BUILTINS}
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.of[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else alias.name.partition(".")[0]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.of |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        pairs = [(target, node.value) for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
        pairs += [(node.target, node.value) for node in nodes if isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value]
        pairs = [pair for pair in pairs if isinstance(pair[0], ast.Name)]
        for _ in pairs:  # a = b may stand before b = c
            before = dict(self.of)
            self.of |= {target.id: path for target, value in pairs if (path := self.path(value)) and path.partition(".")[0] in WATCHED}
            if self.of == before:
                break

    def path(self, node: ast.AST) -> str | None:
        """The dotted path that an expression stands for; None for others. "?" in it: known at run time only."""
        if isinstance(node, ast.Name):
            return _known(self.of[node.id]) if node.id in self.of else None
        if isinstance(node, ast.NamedExpr):
            return self.path(node.value)
        if isinstance(node, ast.Attribute):
            base = self.path(node.value)
            return base and f"{base}.{node.attr}"
        if isinstance(node, ast.Subscript):
            base, key = self.path(node.value), _text(node.slice)
            if base == "sys.modules":
                return _known(key or "?")
            return f"{base.removesuffix('.__dict__')}.{key or '?'}" if base and base.endswith(".__dict__") else None
        return self._path_of_call(node) if isinstance(node, ast.Call) else None

    def _path_of_call(self, node: ast.Call) -> str | None:
        called, first = self.path(node.func), node.args[0] if node.args else None
        if called == "builtins.getattr" and len(node.args) > 1:
            base = self.path(first)
            return base and f"{base}.{_text(node.args[1]) or '?'}"
        if called in ("builtins.__import__", "importlib.import_module"):
            return _known((_text(first) or "?").partition(".")[0] if called.endswith("__import__") else _text(first) or "?")
        if called == "builtins.vars" and first is not None:
            base = self.path(first)
            return base and f"{base}.__dict__"
        if isinstance(node.func, ast.Call) and self.path(node.func.func) == "operator.attrgetter" and first is not None:
            base = self.path(first)
            return base and f"{base}.{_text(node.func.args[0]) or '?'}"
        return None


def _verdict(path: str) -> str | None:
    """What is wrong with a reference to `path`."""
    first = path.partition(".")[0]
    if path == "?" or (path.endswith("?") and first in WATCHED):
        return "chosen at run time"
    for module, safe in MODULES.items():
        rest = path.removeprefix(f"{module}.")
        if rest != path and rest.partition(".")[0] not in safe:
            return f"{module} can run what it reads"
    if any(path == name or path.startswith(f"{name}.") for name in NAMES):
        return "can run what it is given"
    return None


def unsafe_loads(source: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """`line: what` of each finding. allowed: paths that this source alone may name, such as pickle.Unpickler."""
    tree = ast.parse(source)
    names, found, called, inner = _Names(tree), [], {}, set()

    def add(node: ast.AST, what: str) -> None:
        found.append(f"{node.lineno}: {ast.unparse(node)[:80]}: {what}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called[node.func] = node
            for keyword in node.keywords:
                _judge_option(node, keyword.arg, keyword.value, add)
        elif isinstance(node, ast.Dict):  # handed on by **
            for key, value in zip(node.keys, node.values):
                _judge_option(node, _text(key), value, add)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                path = _known(f"{node.module}.{alias.name}")
                what = "all of it" if alias.name == "*" and path.partition(".")[0] in WATCHED else _verdict(path)
                if what and path not in allowed:
                    add(node, what)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if what := _verdict(_known(alias.name)):
                    add(node, what)
    for node in ast.walk(tree):
        if node in inner or isinstance(getattr(node, "ctx", None), ast.Store):
            continue
        path = names.path(node)
        if path is None or path in allowed:
            continue
        if path in CALLED_SAFELY:
            _judge_call(node, path, called.get(node), add)
        elif what := _verdict(path):
            add(node, what)
            inner |= set(ast.walk(node))  # one finding an expression
    return found


def _judge_option(node: ast.AST, name: str | None, value: ast.expr, add) -> None:
    if name in SAFE_VALUES and not (isinstance(value, ast.Constant) and value.value is SAFE_VALUES[name]):
        add(node, f"{name} is not {SAFE_VALUES[name]}")


def _judge_call(node: ast.AST, path: str, call: ast.Call | None, add) -> None:
    """torch.load and numpy.load may be called, with options that are seen to be safe, and not handed on."""
    option, _ = CALLED_SAFELY[path]
    if call is None:
        add(node, "handed on or kept: its options are not to be seen")
        return
    names = [keyword.arg for keyword in call.keywords]
    if None in names or len(call.args) > 2 or any(isinstance(argument, ast.Starred) for argument in call.args):
        add(node, f"{option} is not to be seen")
    elif path == "torch.load" and option not in names:
        add(node, "without weights_only=True")
