"""Lets nnU-Net find the classes of this package by name, and hands `-pretrained_weights` to networks that want it.

Runs at every start of the interpreter (nnunetv2_hyspark.pth), so: standard library only, nothing is imported and
nothing is changed unless nnU-Net itself is imported. nnU-Net's own classes win; ours are looked at where it finds none.
Whatever goes wrong here is said once, in one line, and leaves nnU-Net as it was.
"""
from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing itself is too slow to import at every start
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_DISABLE = "nnUNet_hyspark_disable"
_FINDER = "nnunetv2.utilities.find_class_by_name"
_WEIGHTS = "nnunetv2.run.load_pretrained_weights"
# Every command of nnU-Net imports this module, which in turn imports _FINDER: the place to notice that it has moved.
_EVERY_COMMAND = "nnunetv2.utilities.plans_handling.plans_handler"

_SEARCH_ALSO = {  # package nnU-Net was asked to search -> package of ours
    "nnunetv2.training.nnUNetTrainer": "nnunetv2_hyspark.trainers",
    "nnunetv2.experiment_planning": "nnunetv2_hyspark.planners",
    "nnunetv2.preprocessing.normalization": "nnunetv2_hyspark.normalization",
    "nnunetv2.preprocessing": "nnunetv2_hyspark.preprocessing",
}
_MAY_BE_ABSENT = ("nnunetv2_hyspark.normalization", "nnunetv2_hyspark.preprocessing")


def say(message: str) -> None:
    """Print one line on stderr: `warnings` would add a second one and can be filtered away."""
    print("nnunetv2_hyspark: warning:", " ".join(message.split()), file=sys.stderr)


def find_class(package_name: str, class_name: str, warn: Callable[[str], None] = say) -> type | None:
    """The class `class_name` in the first module of the package, or of its subpackages, that has it; None without one.

    A module that cannot be imported is named by `warn` and passed over.
    """
    from importlib import import_module
    from pkgutil import iter_modules

    def imported(name: str) -> ModuleType | None:
        try:
            return import_module(name)
        except Exception as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == name
            if not (absent and name in _MAY_BE_ABSENT):
                warn(
                    f"{name} cannot be imported ({type(error).__name__}: {error}), so its classes are missing; "
                    f"nnU-Net works on without HySparK, and `hyspark doctor` may know the mend."
                )
            return None

    def search(name: str) -> type | None:
        module = imported(name)
        found = getattr(module, class_name, None)
        if isinstance(found, type):
            return found
        inside = sorted(iter_modules(getattr(module, "__path__", ())), key=lambda entry: entry.ispkg)  # modules first
        for entry in inside:
            found = search(f"{name}.{entry.name}")
            if found is not None:
                return found
        return None

    return search(package_name)


def _takes(function: object, *names: str) -> bool:
    """Whether the first parameters of the function have these names."""
    from inspect import signature

    return callable(function) and tuple(signature(function).parameters)[: len(names)] == names


def _replace_everywhere(stock: object, ours: object, attribute: str) -> None:
    """Also in modules of nnU-Net that ran `from ... import` already, should we come late."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nnunetv2.") and getattr(module, "__dict__", {}).get(attribute) is stock:
            setattr(module, attribute, ours)


class StartupHook:
    """A meta-path finder that finds nothing itself, but extends a few modules of nnU-Net when they are imported."""

    is_hyspark_hook = True  # how another version of this hook would recognise this one

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._extensions: dict[str, Callable[[ModuleType], None]] = {
            _FINDER: self._extend_finder,
            _WEIGHTS: self._extend_weights,
            _EVERY_COMMAND: self._check_finder,
        }

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """What the finders behind this one say, with our extension run right after the module's own code."""
        if name not in self._extensions or is_disabled():
            return None
        for finder in sys.meta_path:
            if not getattr(finder, "is_hyspark_hook", False) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._extend_after_execution(spec)
                    return spec
        return None

    def extend_imported(self) -> None:
        """Extend what was imported before this hook was installed."""
        for name in self._extensions:
            if name in sys.modules and not is_disabled():
                self._extend(sys.modules[name])

    def warn_once(self, message: str) -> None:
        """Say something that has not been said yet in this process."""
        if message not in self._said:
            self._said.add(message)
            say(message)

    def _extend_after_execution(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        try:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # just this once: a reload asks find_spec again
                execute(module)
                self._extend(module)

            loader.exec_module = exec_module
        except Exception as error:
            self._give_up(spec.name, error)

    def _extend(self, module: ModuleType) -> None:
        try:
            self._extensions[module.__name__](module)
        except Exception as error:
            self._give_up(module.__name__, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self.warn_once(
            f"{name} could not be extended ({type(error).__name__}: {error}); nnU-Net works on without HySparK."
        )

    def _extend_finder(self, module: ModuleType) -> None:
        from functools import wraps
        from inspect import signature
        from threading import local

        stock: Any = getattr(module, "recursive_find_python_class", None)
        if getattr(stock, "is_hyspark_hook", False):
            return
        if not _takes(stock, "folder", "class_name", "current_module"):
            self.warn_once(
                f"{_FINDER}.recursive_find_python_class is not the function this version of nnunetv2_hyspark knows; "
                f"nnU-Net works on without HySparK: install a newer nnunetv2-hyspark or an older nnunetv2."
            )
            return
        parameters = signature(stock)
        search = local()  # in nnU-Net 2.7 the function calls itself by its name, so through this wrapper

        @wraps(stock)
        def recursive_find_python_class(*args: Any, **kwargs: Any) -> Any:
            if getattr(search, "is_running", False):
                return stock(*args, **kwargs)
            search.is_running = True
            try:
                found = stock(*args, **kwargs)
            finally:
                search.is_running = False
            if found is not None:
                return found
            asked = parameters.bind(*args, **kwargs).arguments
            package = _SEARCH_ALSO.get(asked["current_module"])
            return None if package is None else find_class(package, asked["class_name"], self.warn_once)

        recursive_find_python_class.is_hyspark_hook = True  # type: ignore[attr-defined]
        module.recursive_find_python_class = recursive_find_python_class  # type: ignore[attr-defined]
        _replace_everywhere(stock, recursive_find_python_class, "recursive_find_python_class")

    def _check_finder(self, module: ModuleType) -> None:
        from importlib.util import find_spec

        if find_spec(_FINDER) is None:
            self.warn_once(
                f"this version of nnU-Net has no {_FINDER}, where HySparK's classes would be found; nnU-Net works on "
                f"without HySparK: install a newer nnunetv2-hyspark or an older nnunetv2."
            )

    def _extend_weights(self, module: ModuleType) -> None:
        from functools import wraps
        from inspect import signature

        stock: Any = getattr(module, "load_pretrained_weights", None)
        if getattr(stock, "is_hyspark_hook", False):
            return
        if not _takes(stock, "network", "fname"):
            self.warn_once(
                f"{_WEIGHTS}.load_pretrained_weights is not the function this version of nnunetv2_hyspark knows; "
                f"-pretrained_weights is left to nnU-Net, which takes weights of the very same network only."
            )
            return
        parameters = signature(stock)

        @wraps(stock)
        def load_pretrained_weights(*args: Any, **kwargs: Any) -> Any:
            asked = parameters.bind(*args, **kwargs).arguments
            network = _unwrapped(asked["network"])
            if hasattr(type(network), "hyspark_load_pretrained") and callable(network.hyspark_load_pretrained):
                network.hyspark_load_pretrained(asked["fname"])
                return None
            return stock(*args, **kwargs)

        load_pretrained_weights.is_hyspark_hook = True  # type: ignore[attr-defined]
        module.load_pretrained_weights = load_pretrained_weights  # type: ignore[attr-defined]
        _replace_everywhere(stock, load_pretrained_weights, "load_pretrained_weights")


def _unwrapped(network: Any) -> Any:
    """The network inside DistributedDataParallel and torch.compile, told by name because torch is not imported here."""
    inside = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
    while (attribute := inside.get(type(network).__name__)) is not None:
        network = getattr(network, attribute)
    return network


def is_disabled() -> bool:
    """Whether the user has switched the hook off with nnUNet_hyspark_disable=1."""
    return os.environ.get(_DISABLE, "").strip().lower() not in ("", "0", "false", "no", "off")


def is_active() -> bool:
    """Whether the hook is installed in this process and not switched off."""
    return not is_disabled() and any(getattr(finder, "is_hyspark_hook", False) for finder in sys.meta_path)


def install() -> None:
    """Install the hook, unless some version of it is installed already."""
    try:
        if not any(getattr(finder, "is_hyspark_hook", False) for finder in sys.meta_path):
            hook = StartupHook()
            sys.meta_path.insert(0, hook)  # type: ignore[arg-type]
            hook.extend_imported()
    except Exception as error:  # must never keep a Python from starting
        say(f"the start-up hook failed ({type(error).__name__}: {error}); nnU-Net works on without HySparK.")
