"""From live objects to a description in JSON values and a table of tensors.

An object is described once, under the path by which it was first met (``"guide.encoder"``); later meetings
are references to that path, so that what was one object is one object again. A tensor is stored once too,
under a name of its own, whichever arguments, parameters and buffers it appears in.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from riemvae._recipe import is_recipe, recipe_arguments
from riemvae.geometry import Metric
from riemvae.guides import AmortizedGuide
from riemvae.persistence import known


def child_path(path: str, key: str) -> str:
    """The path of a part: ``"guide"`` and ``"encoder"`` give ``"guide.encoder"``."""
    key = key if key and "." not in key else repr(key)
    return f"{path}.{key}" if path else key


def class_name(value: Any) -> str:
    """What a message calls an object that must be handed back."""
    if inspect.isroutine(value):
        return f"function {getattr(value, '__module__', None)}.{value.__qualname__}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def local_modules(module: nn.Module, others: set[int], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``module`` and the modules in it by name, without those in ``others`` and all that is in these."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in others:
            yield from local_modules(child, others, f"{prefix}.{name}" if prefix else name)


def local_tensors(module: nn.Module, others: set[int]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, owner, attribute and value of all parameters and buffers of ``local_modules``."""
    for prefix, part in local_modules(module, others):
        for attribute, value in (*part._parameters.items(), *part._buffers.items()):
            if value is not None:
                yield (f"{prefix}.{attribute}" if prefix else attribute), part, attribute, value


def is_part(child: nn.Module) -> bool:
    """Whether a child module that is no constructor argument is described as an object of its own.

    Registered classes are, and metrics: a guide's frozen one is there only after training.
    """
    return is_recipe(child) or isinstance(child, Metric)


class Description:
    """The description of ``root``, an object or a dictionary of objects.

    Attributes:
        root: The node of ``root``: JSON values only.
        tensors: All tensors on the CPU, by name.
        kinds: For each, ``"constant"``, ``"variable"`` (requires gradients), ``"parameter"`` or ``"frozen"``
            (a parameter that requires none).
        customs: What must be handed back, by path: class and weights.
        objects: The live objects by path.
    """

    def __init__(self, root: Any) -> None:
        # What is inside a module that is handed back must not be rebuilt: a first pass finds these modules.
        found = _Pass({})
        found.node(root, "")
        inside: dict[int, tuple[nn.Module, str]] = {}
        for custom in found.custom_objects.values():
            if isinstance(custom, nn.Module):
                for name, part in custom.named_modules():
                    if name:
                        inside.setdefault(id(part), (custom, name))
        final = _Pass(inside)
        self.root = final.node(root, "")
        final.resolve()
        self.tensors, self.kinds, self.customs = final.tensors, final.kinds, final.customs
        self.custom_objects, self.objects = final.custom_objects, final.objects
        self.add_tensor = final.tensor_name


class _Pass:
    def __init__(self, inside: dict[int, tuple[nn.Module, str]]) -> None:
        self.inside = inside  # of modules that are handed back: their parts
        self.tensors: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}
        self.customs: dict[str, dict[str, Any]] = {}
        self.custom_objects: dict[str, Any] = {}
        self.objects: dict[str, Any] = {}
        self._paths: dict[int, str | None] = {}  # None: being described
        self._parts: dict[
            int, tuple[str, str]
        ] = {}  # of modules that are rebuilt: what their constructors make
        self._met: list[Any] = []
        self._tensor_names: dict[int, str] = {}
        self._kept: list[Any] = []  # an object that dies would lend its id to another
        self._pending: list[tuple[dict[str, Any], nn.Module]] = []

    # -- values ----------------------------------------------------------------------------------------------

    def node(self, value: Any, path: str) -> Any:
        """The description of any value."""
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, numbers.Real) and not isinstance(value, (bool, Tensor)):
            if isinstance(value, numbers.Integral):
                return int(value)
            number = float(value)
            return number if math.isfinite(number) else {"float": repr(number)}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor_name(value, path)}
        if isinstance(value, torch.dtype) and value in known.DTYPES.values():
            return {"dtype": str(value).removeprefix("torch.")}
        if type(value) is list:
            return self._items(value, path)
        if type(value) is tuple:
            return {"tuple": self._items(value, path)}
        if type(value) is torch.Size:
            return {"size": list(value)}
        if type(value) is dict:
            return {
                "dict": [
                    [self.node(k, path), self.node(v, child_path(path, str(k)))] for k, v in value.items()
                ]
            }
        return self._object(value, path)

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.node(value, child_path(path, str(i))) for i, value in enumerate(values)]

    def tensor_name(self, value: Tensor, name: str) -> str:
        """The name under which a tensor is stored, ``name`` unless it has one or that is taken."""
        if id(value) in self._tensor_names:
            return self._tensor_names[id(value)]
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(
                f"{name}: expected an ordinary dense tensor, got {value.layout} on {value.device}."
            )
        while name in self.tensors:
            name += "'"
        self._kept.append(value)
        self._tensor_names[id(value)] = name
        self.tensors[name] = value.detach()
        if isinstance(value, nn.Parameter):
            self.kinds[name] = "parameter" if value.requires_grad else "frozen"
        else:
            self.kinds[name] = "variable" if value.requires_grad and value.is_leaf else "constant"
        return name

    # -- objects ---------------------------------------------------------------------------------------------

    def _object(self, value: Any, path: str) -> dict[str, Any]:
        self._met.append(value)
        if id(value) in self._paths:
            known_path = self._paths[id(value)]
            if known_path is None:
                raise ValueError(
                    f"{path}: refers to the {class_name(value)} that it is a part of; break the circle."
                )
            return {"ref": known_path}
        if id(value) in self.inside:
            custom, name = self.inside[id(value)]
            node = {"ref": "", "submodule": name}
            self._pending.append((node, custom))
            return node
        if id(value) in self._parts:
            owner, name = self._parts[id(value)]
            return {"ref": owner, "submodule": name}
        if path in self.objects:
            raise ValueError(f"{path}: two objects would have this path; rename a key.")
        self._paths[id(value)] = None
        self._kept.append(value)
        self.objects[path] = value
        node = self._describe(value, path)
        self._paths[id(value)] = path
        return node

    def _describe(self, value: Any, path: str) -> dict[str, Any]:
        if is_recipe(value):
            node: dict[str, Any] = {"recipe": type(value).__name__}
            arguments = recipe_arguments(value)
        elif isinstance(value, nn.Module) and (layer := known.layer_name(value)):
            if layer in known.CONTAINERS:
                start = len(self._met)
                children = {name: self.node(m, child_path(path, name)) for name, m in value._modules.items()}
                return {"torch": layer, "children": children, **self._state(value, path, start)}
            node, arguments = {"torch": layer}, known.layer_arguments(value)
        elif isinstance(value, Distribution) and (name := known.distribution_name(value)):
            node, arguments = {"distribution": name}, known.distribution_arguments(value)
        else:
            return self._custom(value, path)
        start = len(self._met)
        node["arguments"] = {name: self.node(v, child_path(path, name)) for name, v in arguments.items()}
        if isinstance(value, nn.Module):
            node.update(self._state(value, path, start))
        if is_recipe(value):
            node["values"] = {
                name: self.node(v, path)
                for name, v in vars(value).items()
                if type(v) in (bool, int, float) and name != "training" and name.lstrip("_") not in arguments
            }
        return node

    def _state(self, module: nn.Module, path: str, start: int) -> dict[str, Any]:
        """What a module holds beside its arguments, which are those met since ``start``."""
        others = {id(value) for value in self._met[start:]}
        parts = {}
        for name, child in module._modules.items():
            if child is not None and id(child) not in others and is_part(child):
                parts[name] = self.node(child, child_path(path, name))
                others.add(id(child))
        for name, part in local_modules(module, others):
            if name:
                self._parts.setdefault(id(part), (path, name))
        prefix = f"{path}/" if path else ""
        tensors = {
            name: self.tensor_name(value, prefix + name)
            for name, _, _, value in local_tensors(module, others)
        }
        state: dict[str, Any] = {"training": module.training, "state": tensors}
        return {**state, "parts": parts} if parts else state

    def _custom(self, value: Any, path: str) -> dict[str, Any]:
        custom: dict[str, Any] = {"class": class_name(value)}
        node: dict[str, Any] = {"custom": path}
        if isinstance(value, nn.Module):
            state = value.state_dict(keep_vars=True)
            extra = [name for name, v in state.items() if not isinstance(v, Tensor)]
            if extra:
                raise ValueError(
                    f"{path}: expected a state of tensors, got {extra[0]!r} of {class_name(value)}, which "
                    f"is none; "
                    "make it a buffer or rebuild it in the constructor."
                )
            custom["training"] = value.training
            custom["state"] = {name: self.tensor_name(v, f"{path}/{name}") for name, v in state.items()}
            if isinstance(
                value, AmortizedGuide
            ):  # its model is no part of it; after loading it is the loaded one
                node["model"] = self.node(value.model, child_path(path, "model"))
        self.customs[path] = custom
        self.custom_objects[path] = value
        return node

    def resolve(self) -> None:
        """Fills in the paths of modules that were met after a part of theirs."""
        for node, custom in self._pending:
            owner = self._paths.get(id(custom))
            if owner is None:
                raise ValueError(
                    f"a part of {class_name(custom)} is used, and not that object: save them together."
                )
            node["ref"] = owner
