"""Which file of the repository an import means, or which distribution outside.

One strategy per way of naming files; the registry says which one a language uses. A name that fits
several files equally well resolves to none of them: a missing link is better than a wrong one.
"""

from __future__ import annotations

import posixpath
import re
import sys
import tomllib
from importlib import resources
from typing import TYPE_CHECKING

from gazetteer.paths import parent
from gazetteer.read import grammars

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gazetteer.model import FileFacts, Import

__all__ = ["Resolver"]

_JS_ENDINGS = (
    "",
    ".ts",
    ".tsx",
    ".d.ts",
    ".js",
    ".jsx",
    ".mjs",
    ".cjs",
    ".json",
    "/index.ts",
    "/index.tsx",
    "/index.js",
    "/index.mjs",
)
_RUST_BRACES = re.compile(r"\s+as\s+\w+|\s")


class Resolver:
    """Resolves the imports of one repository.

    Args:
        facts: Every file's facts by path.
        root_package: Dotted name of the package the root folder itself is, if it is one.
        go_module: Folder of each ``go.mod`` and the module path it declares.
    """

    def __init__(
        self,
        facts: Mapping[str, FileFacts],
        *,
        root_package: str = "",
        go_modules: Mapping[str, str] | None = None,
    ) -> None:
        self._paths = facts.keys()
        self._facts = facts
        self._go = dict(go_modules or {})
        self._folders: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        for path in facts:
            self._folders.setdefault(parent(path), []).append(path)
            self._by_name.setdefault(path.rpartition("/")[2], []).append(path)
        self._modules, self._module_of = _python_modules(facts, self._folders, root_package)
        self._cache: dict[tuple[str, str, str, str, str], tuple[str, ...]] = {}
        self._strategies: dict[str, Callable[[str, Import], Sequence[str]]] = {
            "python": self._python,
            "include": self._include,
            "javascript": self._javascript,
            "go": self._go_package,
            "rust": self._rust,
            "java": self._java,
            "relative": self._relative,
        }

    def targets(self, path: str, item: Import) -> tuple[str, ...]:
        """Return the files that an import of ``path`` means, never ``path`` itself."""
        language = grammars.languages()[self._facts[path].language]
        if language.resolver == "none":
            return ()
        where = path if language.resolver in ("python", "rust") else parent(path)
        key = (language.resolver, where, item.module, item.name, item.style)
        found = self._cache.get(key)
        if found is None:
            found = tuple(sorted(set(self._strategies[language.resolver](path, item))))
            self._cache[key] = found
        return tuple(target for target in found if target != path)

    def distribution(self, path: str, item: Import) -> str:
        """Return what an import from outside the repository belongs to; ``""`` for the unknown."""
        language = grammars.languages()[self._facts[path].language]
        if item.module.startswith(language.stdlib):
            return f"{language.title} standard library"
        return _PROVIDERS[language.resolver](item)

    def module_name(self, path: str) -> str:
        """Return the dotted name of a Python file; ``""`` for every other file."""
        return self._module_of.get(path, "")

    # One strategy each.

    def _python(self, path: str, item: Import) -> Sequence[str]:
        module = item.module
        if module.startswith("."):
            tail = module.lstrip(".")
            dots = len(module) - len(tail)
            own = self._module_of.get(path, "").split(".")
            if not path.rpartition("/")[2].startswith("__init__."):
                own = own[:-1]
            if dots - 1 > len(own):
                return ()
            base = own[: len(own) - (dots - 1)]
            module = ".".join([*base, *([tail] if tail else [])])
        elif "." not in module:
            # A script or a test sees what lies beside it before anything else.
            beside = posixpath.join(parent(path), module + ".py")
            if beside in self._paths and "." not in self._module_of.get(path, ""):
                return (beside,)
        if item.name and item.name != "*":
            found = self._modules.get(f"{module}.{item.name}")
            if found:
                return (found,)
        found = self._modules.get(module)
        if found:
            return (found,)
        beside = posixpath.join(parent(path), module.replace(".", "/") + ".py")
        return (beside,) if beside in self._paths else ()

    def _suffix(self, path: str, wanted: str) -> Sequence[str]:
        """Return the one file whose path ends so; of several the one that shares most folders."""
        ending = "/" + wanted
        fits = [p for p in self._by_name.get(wanted.rpartition("/")[2], ()) if p == wanted or p.endswith(ending)]
        if len(fits) <= 1:
            return fits
        ranked = sorted((-len(posixpath.commonprefix([p, path])), len(p), p) for p in fits)
        if ranked[0][:2] == ranked[1][:2]:
            return ()
        return (ranked[0][2],)

    def _include(self, path: str, item: Import) -> Sequence[str]:
        wanted = posixpath.normpath(item.module.strip('<>"'))
        if item.style != "system":
            beside = posixpath.normpath(posixpath.join(parent(path), wanted))
            if beside in self._paths:
                return (beside,)
        while wanted.startswith("../"):
            wanted = wanted[3:]
        if item.style == "system" and "/" not in wanted:
            return (wanted,) if wanted in self._paths else ()
        return self._suffix(path, wanted)

    def _javascript(self, path: str, item: Import) -> Sequence[str]:
        if not item.module.startswith("."):
            return ()
        base = posixpath.normpath(posixpath.join(parent(path), item.module))
        stem = re.sub(r"\.[mc]?js$", "", base)
        for candidate in (base, stem):
            for ending in _JS_ENDINGS:
                if candidate + ending in self._paths:
                    return (candidate + ending,)
        return ()

    def _go_package(self, _path: str, item: Import) -> Sequence[str]:
        for folder, module in self._go.items():
            if item.module == module or item.module.startswith(module + "/"):
                inside = posixpath.normpath(posixpath.join(folder, item.module[len(module) :].lstrip("/")))
                files = self._folders.get("" if inside == "." else inside, ())
                return [f for f in files if f.endswith(".go") and not f.endswith("_test.go")]
        return ()

    def _rust(self, path: str, item: Import) -> Sequence[str]:
        name = path.rpartition("/")[2]
        folder = parent(path)
        own = folder if name in ("mod.rs", "lib.rs", "main.rs") else posixpath.join(folder, name[:-3])
        parts = [part for part in item.module.split("::") if part]
        if item.style == "mod":
            return self._rust_file(own, [item.module])
        if not parts:
            return ()
        if parts[0] == "crate":
            crate = folder
            while crate and not {posixpath.join(crate, "lib.rs"), posixpath.join(crate, "main.rs")} & self._paths:
                crate = parent(crate)
            return self._rust_file(crate, parts[1:])
        if parts[0] == "self":
            return self._rust_file(own, parts[1:])
        if parts[0] == "super":
            while parts and parts[0] == "super":
                own, parts = parent(own), parts[1:]
            return self._rust_file(own, parts)
        return ()

    def _rust_file(self, base: str, parts: list[str]) -> Sequence[str]:
        for length in range(len(parts), 0, -1):
            stem = posixpath.join(base, *parts[:length])
            for candidate in (stem + ".rs", stem + "/mod.rs"):
                if candidate in self._paths:
                    return (candidate,)
        return ()

    def _java(self, path: str, item: Import) -> Sequence[str]:
        parts = item.module.split(".")
        for length in range(len(parts), 1, -1):
            fits = self._suffix(path, "/".join(parts[:length]) + ".java")
            if fits:
                return fits
        return ()

    def _relative(self, path: str, item: Import) -> Sequence[str]:
        wanted = re.split(r"[?#]", item.module, maxsplit=1)[0].strip("<>\"' ")
        if not wanted or "://" in wanted or wanted.startswith("mailto:"):
            return ()
        wanted = re.sub(r"^(?:\$\{?\w+\}?|\$\([^)]*\))/", "", wanted)
        base = posixpath.normpath(posixpath.join("" if wanted.startswith("/") else parent(path), wanted.lstrip("/")))
        for ending in ("", ".cmake", "/CMakeLists.txt", ".rst", ".md", "/README.md", "/index.md", ".sh"):
            if base + ending in self._paths:
                return (base + ending,)
        if item.style == "suffix":
            return self._suffix(path, wanted) or self._suffix(path, wanted + ".cmake")
        return ()


def _python_modules(
    facts: Iterable[str], folders: Mapping[str, list[str]], root_package: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Map dotted names to files and back, from where ``__init__`` files lie."""
    packages = {
        folder
        for folder, files in folders.items()
        if any(f.rpartition("/")[2] in ("__init__.py", "__init__.pyi") for f in files)
    }
    modules: dict[str, str] = {}
    names: dict[str, str] = {}
    several: set[str] = set()
    for path in facts:
        if not path.endswith((".py", ".pyi")):
            continue
        stem = path.rsplit(".", 1)[0]
        folder = parent(path)
        top = folder
        while top and top in packages:
            top = parent(top)
        inside = stem[len(top) :].lstrip("/") if top else stem
        if not top and root_package and ("" in packages):
            inside = root_package.replace(".", "/") + "/" + stem
        dotted = inside.replace("/", ".").removesuffix(".__init__")
        names[path] = dotted
        # A stub never hides the module that it describes.
        known = modules.get(dotted)
        if known is not None and known.endswith(".py") and path.endswith(".py"):
            several.add(dotted)
        if known is None or path.endswith(".py"):
            modules[dotted] = path
        whole = stem.replace("/", ".").removesuffix(".__init__")
        modules.setdefault(whole, path)
    for dotted in several:
        del modules[dotted]
    return modules, names


_DISTRIBUTIONS: dict[str, str] = tomllib.loads(
    resources.files("gazetteer.relate").joinpath("distributions.toml").read_text("utf-8")
)["python"]


def _python_distribution(item: Import) -> str:
    top = item.module.split(".", 1)[0]
    if top in sys.stdlib_module_names:
        return "Python standard library"
    return _DISTRIBUTIONS.get(top, top.replace("_", "-")) if top else ""


def _include_library(item: Import) -> str:
    folder, slash, _ = item.module.strip('<>"').partition("/")
    return folder if slash else ("system headers" if item.style == "system" else "")


def _npm_package(item: Import) -> str:
    if item.module.startswith((".", "/")):
        return ""
    if item.module.startswith("node:"):
        return "Node.js"
    return "/".join(item.module.split("/")[: 2 if item.module.startswith("@") else 1])


def _go_module(item: Import) -> str:
    parts = item.module.split("/")
    return "/".join(parts[:3]) if "." in parts[0] else "Go standard library"


def _crate(item: Import) -> str:
    top = item.module.split("::", 1)[0]
    return "" if top in ("crate", "self", "super") or item.style == "mod" else top


def _java_package(item: Import) -> str:
    return ".".join(item.module.split(".")[:3])


def _cmake_package(item: Import) -> str:
    return item.module if item.style == "package" else ""


_PROVIDERS: dict[str, Callable[[Import], str]] = {
    "python": _python_distribution,
    "include": _include_library,
    "javascript": _npm_package,
    "go": _go_module,
    "rust": _crate,
    "java": _java_package,
    "relative": _cmake_package,
    "none": lambda _item: "",
}
"""For each resolver of the registry: what provides an import from outside the repository."""
