"""What a module declares, without what it computes with: entries are judged before torch is imported.

    light("quantbench.quantizers.gptq").GPTQ      # fields, defaults, types, checks, the methods it overrides

is the module as its source has it, less every statement that is evaluated at import and needs a library (an `import
torch`, a subclass of nn.Module, ...). Functions stay, whatever they do when they are called. A module of which
nothing is left out is imported as it is. That no entry differs from its real class is held by the tests.
"""

import ast
import builtins
import sys
from functools import cache
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType

PACKAGE = Path(__file__).parent
LIBRARIES = sys.stdlib_module_names | {"yaml"}  # these cost nothing


@cache
def light(name: str) -> ModuleType:
    """The light form of a module of this package; the module itself where that is light."""
    loader = _Loader(f"quantbench.light.{name.removeprefix('quantbench.')}", str(_path(name)))
    if loader.is_whole and name.count(".") == 1:  # else its folder's contract, which is not light, would come with it
        return import_module(name)
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # where dataclasses look up what their annotations name
    module.__dict__.update(loader.imported)
    loader.exec_module(module)
    return module


def _path(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class _Loader(SourceFileLoader):
    """Reads a source, and keeps what needs no library."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name, path)
        self.imported: dict[str, object] = {}
        self.is_whole = True
        self._tree = ast.parse(self.get_data(path), path)
        known = {*vars(builtins), "__name__", "__file__"}
        self._tree.body = self._kept(self._tree.body, known)
        future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
        # Annotations are not evaluated: those of functions may name anything.
        self._tree.body.insert(0, ast.fix_missing_locations(future))

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._tree, self.path)  # type: ignore[arg-type]

    def _kept(self, body: list[ast.stmt], known: set[str]) -> list[ast.stmt]:
        """The statements that can be executed where `known` are the names there are; adds those that they bind."""
        kept: list[ast.stmt] = []
        for statement in body:
            match statement:
                case ast.ImportFrom(module="__future__") | ast.If(test=ast.Name("TYPE_CHECKING")):
                    continue
                case ast.Import() | ast.ImportFrom():
                    found = self._import(statement)
                    self.imported |= found
                    known |= found.keys()
                    continue
                case ast.ClassDef():
                    needed = [*statement.bases, *statement.keywords, *statement.decorator_list]
                    bound = {statement.name}
                case ast.FunctionDef():
                    given = statement.args
                    needed = [*statement.decorator_list, *given.defaults, *(d for d in given.kw_defaults if d)]
                    bound = {statement.name}
                case ast.AnnAssign():
                    needed, bound = [statement.value] if statement.value else [], {ast.unparse(statement.target)}
                case _:
                    needed, bound = [statement], _names(statement, ast.Store)
            if any(_names(part, ast.Load) - _names(part, ast.Store) - known for part in needed):
                self.is_whole = False
                continue
            if isinstance(statement, ast.ClassDef):
                statement.body = self._kept(statement.body, set(known)) or [ast.copy_location(ast.Pass(), statement)]
            known |= bound
            kept.append(statement)
        return kept

    def _import(self, statement: ast.Import | ast.ImportFrom) -> dict[str, object]:
        """What an import binds; nothing where it is of a library."""
        found: dict[str, object] = {}
        for alias in statement.names:
            module = statement.module or "" if isinstance(statement, ast.ImportFrom) else alias.name
            bound = alias.asname or alias.name.partition(".")[0]
            if module.partition(".")[0] == "quantbench":
                assert isinstance(statement, ast.ImportFrom), "import quantbench.x: say `from quantbench import x`"
                inside = f"{module}.{alias.name}"
                name = inside if _path(inside).exists() else module
                source = light(name)
                self.is_whole &= source is sys.modules.get(name)
                if name == inside:
                    found[bound] = source
                elif hasattr(source, alias.name):
                    found[bound] = getattr(source, alias.name)
            elif module.partition(".")[0] not in LIBRARIES:
                self.is_whole = False
            elif isinstance(statement, ast.ImportFrom):
                source = import_module(module)
                if not hasattr(source, alias.name):
                    import_module(f"{module}.{alias.name}")
                found[bound] = getattr(source, alias.name)
            else:
                found[bound] = import_module(module if alias.asname else bound)
        return found


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """The names that are read, or bound, in an expression or a statement."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}
    if context is ast.Store:
        found |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}  # of a lambda
    return found
