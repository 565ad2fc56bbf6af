# SPDX-License-Identifier: Apache-2.0
"""What of vLLM this package uses, and whether another version of vLLM still has it.

    python -m tests.next_vllm 0.33.0

takes that version's wheel (0.5 GB; nothing that it needs) and reads its sources. Compared with the
installed version are all names that are imported from vLLM, with the parameters of functions,
methods and constructors that are called or overridden, fields of data classes, and attributes of
classes and modules. What their bodies do, and what is asked of objects, is not. For that the tests
that start no engine then run on the other version's modules, with the installed torch and without
kernels.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
OURS = {
    "vllm_ficoco": ROOT / "vllm_ficoco",
    "ficoco_server": ROOT / "server/ficoco_server",
    "loadtest": ROOT / "loadtest",
}
"""Packages, and where they lie."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Found(NamedTuple):
    """Where a name is defined."""

    module: str
    node: ast.AST


class Use(NamedTuple):
    """Something of vLLM."""

    module: str
    name: str
    attribute: str = ""
    """Of a class: a method, a field, a member."""

    def __str__(self) -> str:
        return f"{self.module}: {self.name}{'.' * bool(self.attribute)}{self.attribute}"


class Sources:
    """Packages as they are written.

    Args:
        packages: folders by name.
    """

    def __init__(self, packages: dict[str, Path]) -> None:
        self.packages = packages
        self.tree, self.find = cache(self.tree), cache(self.find)  # type: ignore[method-assign]

    def file(self, module: str) -> Path | None:
        package, *rest = module.split(".")
        if package not in self.packages:
            return None
        path = self.packages[package].joinpath(*rest)
        files = path / "__init__.py", path.with_suffix(".py") if rest else path / "__init__.py"
        return next((file for file in files if file.is_file()), None)

    def tree(self, module: str) -> ast.Module | None:
        file = self.file(module)
        return ast.parse(file.read_text()) if file else None

    def find(self, module: str, name: str) -> Found | None:
        """Where a module's name is defined, through all imports; a module for itself."""
        tree = self.tree(module)
        for node in _top(tree.body) if tree else ():
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    if node.name == name:
                        return Found(module, node)
                case ast.Assign() | ast.AnnAssign():
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                        return Found(module, node)
                case ast.ImportFrom():
                    for alias in node.names:
                        if (alias.asname or alias.name) in (name, "*"):
                            origin = self._absolute(module, node)
                            there = self.find(origin, name if alias.name == "*" else alias.name)
                            if alias.name == "*" and there is None:
                                continue
                            if there or origin.split(".")[0] in self.packages:
                                return there
                            return Found(module, node)  # of another package
                case ast.Import():
                    if any((a.asname or a.name.split(".")[0]) == name for a in node.names):
                        return Found(module, node)
        if inner := self.tree(f"{module}.{name}"):
            return Found(f"{module}.{name}", inner)
        return self._lazy(module, name, tree) if tree else None

    def _lazy(self, module: str, name: str, tree: ast.Module) -> Found | None:
        """Names that a module makes when they are asked for, from a table."""
        if not any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body):
            return None
        for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
            for key, value in zip(table.keys, table.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name:
                    if isinstance(value, ast.Constant) and ":" in str(value.value):
                        inner, _, what = str(value.value).partition(":")
                        return self.find(module + inner, what)
                    return Found(module, value)
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        file, parts = self.file(module), module.split(".")
        inside = file is not None and file.name == "__init__.py"
        base = parts[: len(parts) - node.level + inside]
        return ".".join([*base, *([node.module] if node.module else [])])

    def ancestry(self, found: Found) -> Iterator[Found]:
        """A class and its bases, as far as these packages have them; roughly in Python's order."""
        yield found
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                there = self.find(found.module, base.id)
                if there and isinstance(there.node, ast.ClassDef):
                    yield from self.ancestry(there)

    def member(self, found: Found, name: str) -> ast.AST | None:
        """What a class has by a name: a function, or the statement that makes it."""
        for owner in self.ancestry(found):
            assert isinstance(owner.node, ast.ClassDef)
            for node in _top(owner.node.body):
                names = [getattr(node, "name", None)]
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [t.id for t in targets if isinstance(t, ast.Name)]
                if name in names:
                    return node
        return None

    def shape(self, use: Use) -> str | None:
        """What must stay the same of something: its parameters, or that it is there; None: gone."""
        found = self.find(use.module, use.name)
        if found is None:
            return None
        node: ast.AST | None = found.node
        if use.attribute and isinstance(node, ast.ClassDef):
            node = self.member(found, use.attribute)
            if node is None:
                return None
        if isinstance(node, Function):
            return _parameters(node)
        if isinstance(node, ast.ClassDef):
            made = self.member(found, "__init__") or self.member(found, "__new__")
            return _parameters(made) if isinstance(made, Function) else self._fields(found)
        return "there"

    def _fields(self, found: Found) -> str:
        fields: list[str] = []
        for owner in reversed([*self.ancestry(found)]):
            assert isinstance(owner.node, ast.ClassDef)
            for node in _top(owner.node.body):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    fields.append(node.target.id + "=" * (node.value is not None))
        return f"({', '.join(dict.fromkeys(fields))})"


def _top(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, those under conditions included."""
    for node in body:
        yield node
        match node:
            case ast.If():
                yield from _top([*node.body, *node.orelse])
            case ast.Try():
                handlers = [s for handler in node.handlers for s in handler.body]
                yield from _top([*node.body, *handlers, *node.orelse])
            case ast.With():
                yield from _top(node.body)


def _parameters(node: Function) -> str:
    """Names, kinds and which have a default; annotations are left out."""
    given, parts = node.args, []
    positional = [*given.posonlyargs, *given.args]
    first_default = len(positional) - len(given.defaults)
    for number, argument in enumerate(positional):
        parts.append(argument.arg + "=" * (number >= first_default))
    if given.vararg or given.kwonlyargs:
        parts.append("*" + (given.vararg.arg if given.vararg else ""))
    parts += [
        a.arg + "=" * (default is not None)
        for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if given.kwarg:
        parts.append("**" + given.kwarg.arg)
    return f"({', '.join(parts)})"


def is_vllm(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "vllm"


def uses_of(sources: Sources, module: str) -> Iterator[Use]:
    """What one of our modules uses of vLLM."""
    tree = sources.tree(module)
    assert tree is not None
    names: dict[str, Use] = {}
    every: list[Use] = []
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_vllm(node.module):
            for alias in node.names:
                use = Use(node.module or "", alias.name)
                names[alias.asname or alias.name] = use
                every.append(use)
                found = sources.find(*use[:2])
                if found and isinstance(found.node, ast.Module):
                    modules[alias.asname or alias.name] = found.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if is_vllm(alias.name) and alias.asname:
                    modules[alias.asname] = alias.name
    yield from every
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if inside := modules.get(node.value.id):
                yield Use(inside, node.attr)
            elif use := names.get(node.value.id):
                found = sources.find(*use[:2])
                of_class = found and isinstance(found.node, ast.ClassDef)
                if found and of_class and sources.member(found, node.attr):
                    yield use._replace(attribute=node.attr)
        elif isinstance(node, ast.ClassDef):
            yield from _inherited(sources, Found(module, node))


def _inherited(sources: Sources, ours: Found) -> Iterator[Use]:
    """Methods of vLLM's classes that one of ours overrides, or calls of itself or ``super()``."""
    assert isinstance(ours.node, ast.ClassDef)
    wanted = {getattr(node, "name", "") for node in ours.node.body if isinstance(node, Function)}
    for node in ast.walk(ours.node):
        if isinstance(node, ast.Attribute):
            value = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(value, ast.Name) and value.id in ("super", "self"):
                wanted.add(node.attr)
    for owner in sources.ancestry(ours):
        if is_vllm(owner.module):
            assert isinstance(owner.node, ast.ClassDef)
            for node in owner.node.body:
                if isinstance(node, Function) and node.name in wanted:
                    yield Use(owner.module, owner.node.name, node.name)


def modules_of(package: str, folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.py")):
        inner = file.relative_to(folder).with_suffix("").parts
        yield ".".join([package, *(part for part in inner if part != "__init__")])


def compare(now: Path, then: Path, ours: dict[str, Path] = OURS) -> dict[Use, tuple[str, str]]:
    """What is used and is not the same in two versions of vLLM: as it was, and as it is.

    What takes more than it did, by default, is the same to who calls it, but not to who overrides
    it. What is only in the other version is asked for where the one that is used has it elsewhere.

    Args:
        now: folder of the version that is used.
        then: of the other.
        ours: folders of the packages that use it.
    """
    before, after = (Sources({**ours, "vllm": folder}) for folder in (now, then))
    used = {
        use
        for package, folder in ours.items()
        for module in modules_of(package, folder)
        for use in uses_of(before, module)
    }
    differ: dict[Use, tuple[str, str]] = {}
    for use in sorted(used):
        was, now = before.shape(use), after.shape(use)
        if was is None and now is not None:
            continue
        if was is None or now is None or not (was == now or _takes_more(use, was, now)):
            differ[use] = was or "not there", now or "gone"
    return differ


def _takes_more(use: Use, was: str, now: str) -> bool:
    """Whether all that is new has a default, of what nobody overrides."""
    old, new = (shape.strip("()").split(", ") for shape in (was, now))
    added = [part for part in new if part not in old]
    known = [part for part in new if part in old] == old
    return not use.attribute and known and all(part == "*" or part[-1] == "=" for part in added)


NEEDS = ("orjson",)
"""What other versions import, and the installed one does not."""

BATCH = "vllm.entrypoints.launchers.run_batch"
ACCEPTED = {
    "vllm.entrypoints.serve.utils.api_utils: cli_env_setup": "cli.py looks in both places",
    "vllm.entrypoints.scale_out.token_in_token_out.serving: ServingTokens": (
        "vLLM makes it, and it becomes ours"
    ),
    **{
        f"{BATCH}: {name}": "cli.py refuses run-batch"
        for name in ("handle_endpoint_request", "read_file", "write_file")
    },
}
"""What may differ, as :class:`Use` is printed, and why that does no harm."""


def sources_of(version: str) -> Path:
    """A folder with a version's package, without what is compiled."""
    folder = ROOT / "build" / f"vllm-{version}"
    if not (folder / "vllm").exists():
        with tempfile.TemporaryDirectory() as wheels:
            take = "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels
            subprocess.run([sys.executable, *take, f"vllm=={version}"], check=True)
            (wheel,) = Path(wheels).iterdir()
            with zipfile.ZipFile(wheel) as packed:
                wanted = [
                    name
                    for name in packed.namelist()
                    if name.startswith("vllm/") and name.endswith((".py", ".json"))
                ]
                packed.extractall(folder, wanted)
        add = "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)
        subprocess.run([sys.executable, *add, *NEEDS], check=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.next_vllm", description=__doc__)
    parser.add_argument("version")
    given = parser.parse_args(arguments)
    spec, folder = find_spec("vllm"), sources_of(given.version)
    assert spec is not None and spec.origin is not None
    found = compare(Path(spec.origin).parent, folder / "vllm")
    for use, (was, now) in found.items():
        print(f"{use}\n    {was}\n    {now}\n    {ACCEPTED.get(str(use), 'not accepted')}")
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "server")))
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_TARGET_DEVICE": "cpu"}
    fast = "-m", "pytest", "-q", "-m", "not engine and not server"
    tests = subprocess.run([sys.executable, *fast], cwd=ROOT, env=environment, check=False)
    sys.exit(any(str(use) not in ACCEPTED for use in found) or tests.returncode)


if __name__ == "__main__":
    main()
