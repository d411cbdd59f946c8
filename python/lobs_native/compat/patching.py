"""``patch``: replaces a host's classes and functions inside a ``with`` block."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import inspect
import io
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from lobs_native.compat.hosts import HOSTS, Call, Compare, Host, Replacement, find_host
from lobs_native.compat.record import Line, Record
from lobs_native.errors import ArgumentError, HostError

__all__ = ["patch"]

_MARK = "_lobs_native_replaces"  # the attribute by which a replacement refers to its original


@contextlib.contextmanager
def patch(*hosts: str | Host, verify: int = 0, **options: Any) -> Iterator[Record]:
    """Replace the classes and functions of hosts inside a ``with`` block.

    Every name of the same object is replaced: in the host's module and in all modules that imported
    it from there, ``__main__`` included, under any name. A host imported later, inside the block,
    is replaced as soon as its module has run. At the end of the block, even after an exception,
    everything is restored. Objects made inside keep using the replacements.

    Parameters
    ----------
    *hosts : str or Host
        Names from ``lobs_native.compat.HOSTS``; by default all of them. A host that is not
        installed is ignored.
    verify : int
        n > 0: repeat every n-th call of each function with the host's own code on copies, record
        the differences, and warn if they exceed the host's tolerance. 0: never.
    **options
        Options of the replacements: for ``"sparsegpt"``, ``numerics`` and ``method`` (see
        ``lobs_native.compat.sparsegpt.SparseGPT``). Only ``numerics="host"`` can be verified.

    Yields
    ------
    Record
        What was replaced and called so far: ``print(record)``.

    Raises
    ------
    ArgumentError
        A host or option is unknown, or a host is already patched.
    HostError
        The signatures of the host's code differ from those known here; nothing is replaced. For a
        module imported inside the block, that import raises it.
    """
    if isinstance(verify, bool) or not isinstance(verify, int) or verify < 0:
        raise ArgumentError(f"verify: {verify!r}; expected a number of calls, an integer >= 0")
    if verify and options.get("numerics", "host") != "host":
        raise ArgumentError(
            f"verify: {verify} with numerics={options['numerics']!r}: only the host's own numerics "
            "can be compared with the host's code; leave one of them out"
        )
    patcher = _Patcher([find_host(name) for name in hosts or HOSTS], verify, options)
    with patcher:
        yield patcher.record


@dataclass(frozen=True)
class _Installed:
    """One replaced object."""

    owner: Any  # the host's module, or a class in it
    name: str  # of its attribute
    original: Any
    ours: Any


class _Patcher:
    def __init__(self, hosts: Sequence[Host], verify: int, options: dict[str, Any]) -> None:
        self.hosts = hosts
        self.verify = verify
        self.options = options
        self.record = Record()
        self.installed: list[_Installed] = []
        self.active = False
        self.wanted: dict[str, list[tuple[str, Replacement]]] = {}  # by module; with the host
        for host in hosts:
            for replacement in host.replacements:
                for name in replacement.modules:
                    self.wanted.setdefault(name, []).append((host.name, replacement))
        self.watcher = _Watcher(self.wanted, self.install)
        self._check_options()

    def _check_options(self) -> None:
        replacements = [r for host in self.hosts for r in host.replacements]
        known = {name for r in replacements for name in _options_of(r.ours)}
        for option in self.options:
            if option not in known:
                raise ArgumentError(
                    f"{option}: no such option for {', '.join(h.name for h in self.hosts)}; "
                    f"known: {', '.join(sorted(known)) or 'none'}"
                )
        for replacement in replacements:
            check = getattr(replacement.ours, "check_options", None)
            if check is not None:
                check(**_fitting(replacement.ours, self.options))

    def __enter__(self) -> None:
        loaded = {name: sys.modules[name] for name in self.wanted if name in sys.modules}
        for name, module in loaded.items():  # check all before replacing any
            for _, replacement in self.wanted[name]:
                _check_signatures(module, replacement)
        self.active = True
        for name, module in loaded.items():
            self.install(name, module)
        sys.meta_path.insert(0, self.watcher)

    def __exit__(self, *exception: object) -> None:
        self.active = False
        if self.watcher in sys.meta_path:
            sys.meta_path.remove(self.watcher)
        for item in reversed(self.installed):
            setattr(item.owner, item.name, item.original)
            for _, namespace, name in _references(item.ours):
                namespace[name] = item.original

    def install(self, module_name: str, module: ModuleType) -> None:
        """Replace the objects of ``module``, there and wherever else there is a reference."""
        new = []
        for host, replacement in self.wanted[module_name]:  # check all before replacing any
            _, _, original = _look_up(module, replacement.attribute)
            # It may come from another module of the host, and have been replaced with that one.
            if not any(item.ours is original for item in self.installed):
                _check_signatures(module, replacement)
                new.append((host, replacement))
        for host, replacement in new:
            owner, name, original = _look_up(module, replacement.attribute)
            ours = self._recording(host, replacement, original)
            self.installed.append(_Installed(owner, name, original, ours))
            setattr(owner, name, ours)
            self.record.places.append(f"{module_name}.{replacement.attribute}")
            for other_module, namespace, other_name in _references(original):
                namespace[other_name] = ours
                self.record.places.append(f"{other_module}.{other_name}")

    @contextlib.contextmanager
    def originals_restored(self) -> Iterator[None]:
        """Restore the host's names while its own code runs, since it may call itself by them."""
        for item in self.installed:
            setattr(item.owner, item.name, item.original)
        try:
            yield
        finally:
            for item in self.installed:
                setattr(item.owner, item.name, item.ours)

    def _recording(self, host: str, replacement: Replacement, original: Any) -> Any:
        """A new subclass or wrapper of ours that records calls. It is unique, so that all
        references to it can be found when the original is restored."""
        ours = replacement.ours
        options = _fitting(ours, self.options)
        if not inspect.isclass(ours):
            function = functools.partial(ours, **options)
            functools.update_wrapper(function, ours)
            line = self.record.line(host, replacement.attribute)
            wrapper = self._recorded(line, replacement, original, function, "")
            setattr(wrapper, _MARK, original)
            return wrapper
        body = {"__doc__": ours.__doc__, "__module__": ours.__module__, _MARK: original, **options}
        for method in replacement.methods:
            line = self.record.line(host, f"{replacement.attribute}.{method}")
            body[method] = self._recorded(
                line, replacement, original, getattr(ours, method), method
            )
        return type(ours.__name__, (ours,), body)

    def _recorded(
        self,
        line: Line,
        replacement: Replacement,
        original: Any,
        function: Callable[..., Any],
        method: str,
    ) -> Callable[..., Any]:
        record = self.record

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            number = record.begin(line)
            compare = None
            due = self.active and self.verify and number % self.verify == 0
            if due and replacement.verify is not None:
                instance, rest = (args[0], args[1:]) if method else (None, args)
                compare = replacement.verify(Call(original, instance, method, rest, kwargs))
            started = time.perf_counter()
            failed = True
            try:
                result = function(*args, **kwargs)
                failed = False
            finally:
                record.end(line, time.perf_counter() - started, failed=failed)
            if compare is not None:
                self._compare(line, replacement, compare, result)
            return result

        return recorded

    def _compare(self, line: Line, replacement: Replacement, compare: Compare, result: Any) -> None:
        try:
            with self.originals_restored(), _without_side_effects():
                difference = compare(result)
        except Exception as error:  # the host's code may fail where ours did not: only note it
            reason = f"the host's own code raised {type(error).__name__}: {error}"
            self.record.not_compared(line, reason)
            return
        self.record.compared(line, difference, replacement.tolerance)


@contextlib.contextmanager
def _without_side_effects() -> Iterator[None]:
    """Suppress the output of the host's own code and its use of random numbers. On a machine
    without CUDA, also its calls of torch.cuda.synchronize."""
    synchronize = torch.cuda.synchronize
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.cuda.synchronize = synchronize


# ---- the objects of a host -----------------------------------------------------------------------


def _look_up(module: ModuleType, attribute: str) -> tuple[Any, str, Any]:
    """(owner, name, object) of a dotted attribute."""
    owner: Any = module
    *path, name = attribute.split(".")
    try:
        for part in path:
            owner = getattr(owner, part)
        return owner, name, inspect.getattr_static(owner, name)
    except AttributeError:
        raise HostError(
            f"{module.__name__}: has no {attribute}, so it is not the code that lobs_native "
            f"replaces ({_place(module)}); leave this host out"
        ) from None


def _references(wanted: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every (module name, its namespace, variable name) that refers to this very object."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("lobs_native.") or not isinstance(module, ModuleType):
            continue
        namespace = vars(module)
        for name, value in list(namespace.items()):
            if value is wanted:
                yield module_name, namespace, name


def _check_signatures(module: ModuleType, replacement: Replacement) -> None:
    _, _, original = _look_up(module, replacement.attribute)
    label = f"{module.__name__}.{replacement.attribute}"
    if _MARK in getattr(original, "__dict__", {}):
        raise ArgumentError(f"hosts: {label} is already patched; leave out the inner patch()")
    for method, accepted in replacement.signatures.items():
        where = f"{label}.{method}" if method else label
        function = getattr(original, method, None) if method else original
        if not callable(function):
            raise HostError(f"{where}: does not exist ({_place(module)}); leave this host out")
        signature = signature_text(function)
        if signature not in accepted:
            raise HostError(
                f"{where} takes {signature}, but lobs_native replaces one that takes "
                f"{' or '.join(accepted)} ({_place(module)}); leave this host out, or use the "
                "version of it that fits"
            )


def signature_text(function: Callable[..., Any]) -> str:
    """The signature without annotations: ``"(self, sparsity, prunen=0)"``."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def _place(module: ModuleType) -> str:
    return f"found in {getattr(module, '__file__', None) or 'memory'}"


def _options_of(ours: Any) -> tuple[str, ...]:
    """The names in ``OPTIONS``: attributes of a class, or keyword arguments of a function."""
    return tuple(getattr(ours, "OPTIONS", ()))


def _fitting(ours: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _options_of(ours)}


# ---- modules imported later ----------------------------------------------------------------------


class _Watcher(importlib.abc.MetaPathFinder):
    """Delegates to the other finders, and calls ``after`` as soon as a module has run, before its
    importer takes anything from it."""

    def __init__(self, names: Container[str], after: Callable[[str, ModuleType], None]) -> None:
        self.names = names
        self.after = after

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the others give, with a loader that calls ``after``."""
        if fullname not in self.names:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if isinstance(spec, importlib.machinery.ModuleSpec):
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, functools.partial(self.after, fullname))
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, after: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Hide the watcher from the module, which may ask its loader for its source.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.after(module)
