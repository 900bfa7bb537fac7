"""`import torch` without what a first token does not need: that is imported when it is asked for.

A third to a half of the time that torch's import takes goes into modules for tracing, exporting, quantising
and distributions. A deferred module stands in `sys.modules` from the beginning, with its name and place but
without its content. Whoever asks it for an attribute, or for a submodule, has it imported there and then.
Two things are special:

- A few functions of deferred modules have a name in `torch` itself. There a function stands that imports
  the module when it is called, until the module is imported and the function itself takes that place.
- `torch._meta_registrations`, and its like for torch.distributed, are imported for what they do, not for
  what they hold: they teach operators about tensors without data. Tracing and compiling need that, so
  whoever imports what does them, or transformers, has everything imported first.

With another release of torch than those that this was tested with, nothing is deferred; should the import
fail all the same, the process starts over and imports everything.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    Loader = object  # the real one brings importlib.resources and zipfile along, for nothing

TESTED = ((2, 11), (2, 14))

# Torch's modules import each other in circles, which only some orders resolve: this one. So whoever asks for
# one of them gets those before it as well. The first ones are not its own.
DEFERRED = (
    "unittest.mock",
    "torchgen.model",
    "torch.distributions",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.ao",
    "torch.quantization",
    "torch.nested",
    "torch.utils.data",
    "torch.masked",
    "torch.optim",
    "torch.profiler",
    "torch._lobpcg",
    "torch.func",
    "torch._higher_order_ops",
    "torch.export",
    "torch.compiler",
    "torch.distributed._meta_registrations",
    "torch._meta_registrations",
)
# Functions that `torch` has from a deferred module.
_NAMED_IN_TORCH = {
    "torch._lobpcg": ("lobpcg",),
    "torch.func": ("vmap",),
    "torch._higher_order_ops": ("cond", "while_loop"),
}
_DEFER_NOTHING = "FIRSTLIGHT_DEFER_NOTHING"
_NEED_EVERYTHING = ("torch._dynamo", "torch._inductor", "transformers")


# Set as soon as torch's import has got as far as having its libraries loaded.
native_parts = threading.Event()


def import_torch() -> None:
    """Import torch, deferring what can be. Nothing happens if it has been imported before."""
    try:
        _import_torch()
    finally:
        native_parts.set()


def _import_torch() -> None:
    if "torch" in sys.modules or _DEFER_NOTHING in os.environ or not _tested():
        return
    sys.meta_path.insert(0, _finder)
    _finder.importing_torch = True
    try:
        import torch  # noqa: F401
    except ImportError as error:
        # What of torch has been imported cannot be imported again.
        print(f"firstlight: torch is imported anew, as a whole: {error}", file=sys.stderr, flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _DEFER_NOTHING: "1"})
    finally:
        _finder.importing_torch = False


def import_the_rest() -> None:
    """Import whatever is still deferred: from then on all is as after a plain `import torch`."""
    _finder.load_all()


class _Deferred(ModuleType):
    """A module whose content is imported when it is first asked for an attribute."""

    def __getattr__(self, name: str) -> Any:
        # The import system and `inspect` look at any module's attributes of this form.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        return _finder.attribute(self, name)


class _Finder:
    """Finds deferred modules, and knows which are without their content still."""

    def __init__(self) -> None:
        self.importing_torch = False
        self._pending: dict[str, ModuleSpec] = {}
        self._loading: set[str] = set()
        self._forwarders: dict[tuple[str, str], Callable[..., Any]] = {}
        self._lock = threading.RLock()

    # ---- the import system asks --------------------------------------------------------------

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if self.importing_torch and "torch._C" in sys.modules:
            native_parts.set()
        if fullname in _NEED_EVERYTHING:
            self.load_all()
            return None
        parent = fullname.rpartition(".")[0]
        if parent in self._pending and parent not in self._loading:
            # The content of a package comes before its submodules, and may bring this one along.
            self.load_up_to(parent)
            if fullname in sys.modules:
                return ModuleSpec(fullname, _Imported(sys.modules[fullname]))
        if fullname not in DEFERRED or not self.importing_torch:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Deferring(spec.loader, self._pending)
        return spec

    # ---- what is deferred is imported --------------------------------------------------------

    def attribute(self, module: ModuleType, name: str) -> Any:
        """What a deferred module has under a name. Raises `AttributeError`."""
        key = (module.__name__, name)
        if self.importing_torch and name in _NAMED_IN_TORCH.get(module.__name__, ()):
            if key not in self._forwarders:
                self._forwarders[key] = _forwarder(module, name)
            return self._forwarders[key]
        with self._lock:
            # Of a module that this thread is importing, what is not there yet is not there.
            if module.__name__ not in self._loading:
                self.load_up_to(module.__name__)
            if name in module.__dict__:
                return module.__dict__[name]
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}", name=name, obj=module)

    def load_up_to(self, name: str) -> None:
        """Give a deferred module its content, and those before it."""
        with self._lock:
            for each in DEFERRED[: DEFERRED.index(name) + 1]:
                if each in self._pending and each not in self._loading:
                    self._load(each)

    def load_all(self) -> None:
        """Give every deferred module its content."""
        self.load_up_to(DEFERRED[-1])
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _load(self, name: str) -> None:
        module, spec = sys.modules[name], self._pending[name]
        assert spec.loader is not None
        self._loading.add(name)
        try:
            spec.loader.exec_module(module)
            del self._pending[name]
            module.__class__ = ModuleType
        finally:
            self._loading.discard(name)
        self._put_in_place(module)

    def _put_in_place(self, module: ModuleType) -> None:
        """Functions take the places of those that stood in for them."""
        ours = {key: self._forwarders.pop(key) for key in [*self._forwarders] if key[0] == module.__name__}
        if not ours:
            return
        real = {id(forwarder): getattr(module, key[1]) for key, forwarder in ours.items()}
        for other in list(sys.modules.values()):
            if isinstance(other, ModuleType):
                for name, value in list(vars(other).items()):
                    if id(value) in real:
                        setattr(other, name, real[id(value)])


class _Deferring(Loader):
    """Makes a module without its content."""

    def __init__(self, loader: Loader, pending: dict[str, ModuleSpec]) -> None:
        self._loader = loader
        self._pending = pending

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._pending[module.__name__] = module.__spec__


class _Imported(Loader):
    """Hands over a module that its package has imported in the meantime."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _forwarder(module: ModuleType, name: str) -> Callable[..., Any]:
    def forward(*arguments: Any, **named: Any) -> Any:
        return getattr(module, name)(*arguments, **named)

    forward.__name__ = forward.__qualname__ = name
    return forward


def _tested() -> bool:
    """Whether the installed torch is a release that deferring was tested with."""
    spec = PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.search(r"__version__ = '(\d+)\.(\d+)\.", text)
    return found is not None and TESTED[0] <= (int(found[1]), int(found[2])) <= TESTED[1]


_finder = _Finder()
