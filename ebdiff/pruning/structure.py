"""A module's structure as JSON: classes by their import path, plain attributes by value, tensors by name.

Building it again runs no constructor and calls nothing that the file names.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import EbdiffError
from ..nn.replace.classes import plain_class

__all__ = ["build", "describe"]

_TRUSTED = ("torch", "diffusers", "ebdiff")
_FORBIDDEN = sys.stdlib_module_names - {"__main__"}
# What every module has, hooks among it; and our own marks.
_OWN = {*vars(nn.Module()), "_ebdiff_shrinks", "_ebdiff_accelerated", "_ebdiff_channels_last"}


def describe(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(structure as JSON values, tensors that are neither parameters nor buffers, by name).

    Raises:
        EbdiffError: an attribute that cannot be written; it is named.
    """
    writer = _Writer(model)
    return writer.module(model, ""), writer.extra


def build(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module described, with these tensors.

    Raises:
        EbdiffError: a damaged description, a missing tensor, or a class that has not been imported.
    """
    try:
        return _Reader(tensors).module(structure)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, EbdiffError):
            raise
        raise EbdiffError("damaged structure", got=repr(error), remedy="save the network again") from None


def _class_of(module: nn.Module) -> type:
    """The class that a user wrote: not one made for an accelerated or a parametrized module."""
    kind = plain_class(type(module))
    made = kind.__module__ == parametrize.__name__ and parametrize.is_parametrized(module)
    return kind.__mro__[1] if made else kind


def _parametrize(module: nn.Module) -> None:
    """Give a module whose `parametrizations` are there the class that computes its tensors by them."""
    known: Any = module._modules.pop("parametrizations")
    for name in known:  # torch makes that class when something is registered
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity())
    module._modules["parametrizations"] = known


def _path_of(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _find(path: str) -> Any:
    """The class or function at module:qualname, of a trusted package or a module the caller has imported."""
    module, _, qualname = path.partition(":")
    root = module.split(".")[0]
    if root in _TRUSTED:
        import_module(module)
    if module not in sys.modules:
        raise EbdiffError(
            f"{path.replace(':', '.')} is not imported",
            expected="its module imported before loading, so that a file cannot import code by itself",
            got="not in sys.modules",
            remedy=f"import {module} first",
        )
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is None:
        script = "the script that is run now; better, keep it in a module, import that, and save the network again"
        raise EbdiffError(
            f"{module} has no {qualname}",
            expected="the class where it stood when the network was saved",
            got="nothing by this name",
            remedy=f"define or import {qualname} in {script if module == '__main__' else module}",
        )
    home = (getattr(found, "__module__", None) or "").split(".")[0]
    if root in _FORBIDDEN or home not in (root, *_TRUSTED):  # not through torch.os.system either
        raise EbdiffError(
            "structure", expected="a class or function of a model", got=path, remedy="do not load this file"
        )
    return found


class _Writer:
    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[int, str] = {}
        self.names = {id(module): name for name, module in model.named_modules()}
        self.extra: dict[str, Tensor] = {}

    def module(self, module: nn.Module, name: str) -> dict[str, Any]:
        if id(module) in self.seen:
            return {"same": self.seen[id(module)]}
        self.seen[id(module)] = name
        prefix = f"{name}." if name else ""
        own = _class_of(module)
        self._check_class(own, name)
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            if getattr(module, kind):
                raise EbdiffError(
                    f"{name or 'the model'} has hooks", expected="none", got=kind, remedy="remove them first"
                )
        return {
            "class": _path_of(own),
            "name": name,
            "parameters": {key: self._tensor(value, prefix + key) for key, value in module._parameters.items()},
            "buffers": {
                key: [self._tensor(value, prefix + key), key not in module._non_persistent_buffers_set]
                for key, value in module._buffers.items()
            },
            "attributes": {k: self.value(v, prefix + k) for k, v in vars(module).items() if k not in _OWN},
            "modules": {k: v and self.module(v, prefix + k) for k, v in module._modules.items()},
        }

    def _tensor(self, tensor: Tensor | None, name: str) -> list[Any] | None:
        if tensor is None:
            return None
        first = self.seen.setdefault(id(tensor), name)
        return [first, tensor.requires_grad]

    def _check_class(self, kind: type, name: str) -> None:
        if (
            "<locals>" in kind.__qualname__
            or getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind
        ):
            raise EbdiffError(
                f"cannot save {name or 'the model'}",
                expected="a class that can be imported by its name",
                got=_path_of(kind),
                remedy="define it at the top level of a module",
            )

    def value(self, value: Any, name: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            self.extra[f"attribute:{name}"] = value
            return {"tensor": f"attribute:{name}"}
        if isinstance(value, nn.Module) and id(value) in self.names:
            return {"submodule": self.names[id(value)]}
        if isinstance(value, torch.dtype | torch.device):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        if isinstance(value, tuple | list | set | frozenset) and type(value).__module__ in ("builtins", "torch"):
            kind = "tuple" if isinstance(value, torch.Size) else type(value).__name__
            return {kind: [self.value(item, f"{name}[{i}]") for i, item in enumerate(value)]}
        if type(value) in (dict, OrderedDict):
            return {"dict": [[self.value(k, name), self.value(v, f"{name}[{k!r}]")] for k, v in value.items()]}
        if hasattr(value, "__qualname__") and "<" not in value.__qualname__:
            return {"named": _path_of(value)}
        if hasattr(value, "__dict__") and not hasattr(value, "__qualname__"):
            self._check_class(type(value), name)
            attributes = {key: self.value(item, f"{name}.{key}") for key, item in vars(value).items()}
            return {"object": _path_of(type(value)), "attributes": attributes}
        raise EbdiffError(
            f"cannot save attribute {name}",
            expected="plain data, a tensor, a module or something importable by name",
            got=repr(value)[:80],
            remedy="replace it (a lambda by a function at the top level of a module)",
        )


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, nn.Parameter] = {}

    def module(self, description: Mapping[str, Any]) -> nn.Module:
        if "same" in description:
            return self.modules[description["same"]]
        kind = _find(description["class"])
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise EbdiffError("structure", expected="a module class", got=description["class"], remedy="save it again")
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        self.modules[description["name"]] = module
        for key, entry in description["parameters"].items():
            module._parameters[key] = entry and self._parameter(*entry)
        for key, (entry, persistent) in description["buffers"].items():
            module.register_buffer(key, entry and self.tensors[entry[0]], persistent=persistent)
        for key, child in description["modules"].items():
            module._modules[key] = child and self.module(child)
        if "parametrizations" in description["modules"]:
            _parametrize(module)
        vars(module).update(self._attributes(kind, description["attributes"]))
        return module

    def _attributes(self, kind: type, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Plain attributes; none may stand in for a method, a property or what nn.Module keeps for itself."""
        for key in attributes:
            held = getattr(kind, key, None)
            if key in _OWN - {"training"} or key.startswith("__") or callable(held) or isinstance(held, property):
                raise EbdiffError("structure", expected="plain attributes", got=key, remedy="do not load this file")
        return {key: self.value(value) for key, value in attributes.items()}

    def _parameter(self, name: str, requires_grad: bool) -> nn.Parameter:
        if name not in self.parameters:
            self.parameters[name] = nn.Parameter(self.tensors[name], requires_grad=requires_grad)
        return self.parameters[name]

    def value(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content), *rest) = value.items()
        if kind in ("tuple", "list", "set", "frozenset"):
            return {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset}[kind](map(self.value, content))
        if kind == "dict":
            return {self.value(k): self.value(v) for k, v in content}
        if kind == "tensor":
            return self.tensors[content]
        if kind == "submodule":
            return self.modules[content]
        if kind == "dtype":
            return getattr(torch, content)
        if kind == "device":
            return torch.device(content)
        if kind == "named":
            return _find(content)
        if kind == "object":
            made_of = _find(content)
            if not isinstance(made_of, type) or hasattr(made_of, "__del__"):
                raise EbdiffError("structure", expected="a plain class", got=content, remedy="do not load this file")
            made: Any = object.__new__(made_of)
            vars(made).update(self._attributes(made_of, rest[0][1]))
            return made
        raise EbdiffError("structure", expected="a known kind of value", got=str(kind), remedy="save it again")
