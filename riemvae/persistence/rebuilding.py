"""From a description back to objects, by classes from fixed lists only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from riemvae._recipe import RECIPES
from riemvae.guides import AmortizedGuide
from riemvae.persistence import known
from riemvae.persistence.description import child_path, local_modules, local_tensors


class Rebuilding:
    """Builds what a :class:`~riemvae.persistence.description.Description` describes.

    Args:
        tensors: All tensors by name, on the device where the objects shall be.
        kinds: What each tensor is.
        customs: The entries of what is handed back, by path.
        modules: The objects handed back, by path.
        restore: Put the saved weights into the objects handed back; False leaves them alone.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        kinds: Mapping[str, str],
        customs: Mapping[str, Any],
        modules: Mapping[str, Any],
        restore: bool = True,
    ) -> None:
        self._tensors, self._kinds, self._customs = tensors, kinds, customs
        self._modules, self._restore = modules, restore
        self._shared: dict[str, Tensor] = {}
        self.objects: dict[str, Any] = {}
        self._met: list[Any] = []
        self._builders: dict[str, Callable[[dict[str, Any], str], Any]] = {
            "float": lambda node, path: float(node["float"]),
            "tensor": lambda node, path: self.tensor(node["tensor"]),
            "dtype": lambda node, path: known.DTYPES[node["dtype"]],
            "tuple": lambda node, path: tuple(self.build(node["tuple"], path)),
            "size": lambda node, path: torch.Size(node["size"]),
            "dict": self._dict,
            "ref": self._reference,
            "custom": self._custom,
            "recipe": self._recipe,
            "torch": self._layer,
            "distribution": self._distribution,
        }

    def hand_back(self) -> None:
        """Checks the objects handed back and restores their weights."""
        for path, custom in self._customs.items():
            module, state = self._modules[path], custom.get("state")
            if state is None:
                continue
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"modules[{path!r}]: expected a module ({custom['class']}), got {type(module)}."
                )
            if self._restore:
                self._load(path, module, state)
                module.train(custom["training"])

    def _load(self, path: str, module: nn.Module, state: Mapping[str, str]) -> None:
        saved = {name: self._value(tensor) for name, tensor in state.items()}
        current = module.state_dict(keep_vars=True)
        for name in saved.keys() & current.keys():  # the saved dtype and device, in the objects as they are
            if isinstance(current[name], Tensor):
                current[name].data = current[name].data.to(saved[name])
        try:
            module.load_state_dict(saved, strict=True)
        except RuntimeError as error:
            raise ValueError(
                f"modules[{path!r}]: the saved weights do not fit: {error}; build it with the arguments "
                f"that it "
                "was saved with."
            ) from None
        for name, value in module.state_dict(keep_vars=True).items():
            self._shared.setdefault(state[name], value)  # a tie to what is rebuilt stays a tie

    # -- values ----------------------------------------------------------------------------------------------

    def build(self, node: Any, path: str) -> Any:
        """The value that a node describes."""
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, list):
            return [self.build(item, child_path(path, str(i))) for i, item in enumerate(node)]
        builders = [builder for key, builder in self._builders.items() if key in node]
        if len(builders) != 1:
            raise ValueError(f"{path or 'content'}: not a node that this riemvae knows: {str(node)[:80]}.")
        return builders[0](node, path)

    def _dict(self, node: dict[str, Any], path: str) -> dict[Any, Any]:
        return {self.build(k, path): self.build(v, child_path(path, str(k))) for k, v in node["dict"]}

    def _value(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ValueError(
                f"the tensor {name!r} is missing from the weights: the files do not fit; save again."
            )
        return self._tensors[name]

    def tensor(self, name: str) -> Tensor:
        """The one tensor of that name."""
        if name not in self._shared:
            value, kind = self._value(name), self._kinds[name]
            if kind in ("parameter", "frozen"):
                value = nn.Parameter(value, requires_grad=kind == "parameter")
            elif kind == "variable":
                value = value.requires_grad_()
            self._shared[name] = value
        return self._shared[name]

    # -- objects ---------------------------------------------------------------------------------------------

    def _reference(self, node: dict[str, Any], path: str) -> Any:
        owner = node["ref"]
        value = self._modules[owner] if owner in self._customs else self.objects[owner]
        if node.get("submodule"):
            value = value.get_submodule(node["submodule"])
        self._met.append(value)
        return value

    def _custom(self, node: dict[str, Any], path: str) -> Any:
        value = self._modules[node["custom"]]
        self._enter(value, path)
        if "model" in node:
            model = self.build(node["model"], child_path(path, "model"))
            if self._restore and isinstance(value, AmortizedGuide):
                value._model_reference = (model,)
                value._structures.clear()
        return value

    def _enter(self, value: Any, path: str) -> None:
        self._met.append(value)
        self.objects[path] = value

    def _recipe(self, node: dict[str, Any], path: str) -> Any:
        cls = RECIPES.get(node["recipe"])
        if cls is None:
            raise ValueError(
                f"{path or 'content'}: {node['recipe']!r} is no registered class of this riemvae; "
                "upgrade riemvae, or import the module that registers it first."
            )
        arguments, others = self._arguments(node, path, vars(cls)["_recipe_arguments"])
        value = _construct(cls, arguments, path)
        self._enter(value, path)
        if isinstance(value, nn.Module):
            self._restore_state(value, node, path, others)
        for name, number in node["values"].items():
            number = self.build(number, path)
            if type(vars(value).get(name)) is type(number) and isinstance(number, (bool, int, float)):
                vars(value)[name] = number
        return value

    def _layer(self, node: dict[str, Any], path: str) -> nn.Module:
        name = node["torch"]
        if name in known.CONTAINERS:
            start = len(self._met)
            children = OrderedDict(
                (k, self.build(v, child_path(path, k))) for k, v in node["children"].items()
            )
            others = {id(met) for met in self._met[start:]}
            value = known.CONTAINERS[name]()
            for key, child in children.items():
                value.add_module(key, child)
        elif name in known.LAYERS:
            arguments, others = self._arguments(node, path)
            value = _construct(known.LAYERS[name], arguments, path)
        else:
            raise ValueError(f"{path}: {name!r} is no layer that a file may name; upgrade riemvae.")
        self._enter(value, path)
        self._restore_state(value, node, path, others)
        return value

    def _distribution(self, node: dict[str, Any], path: str) -> Any:
        name = node["distribution"]
        if name not in known.DISTRIBUTIONS:
            raise ValueError(f"{path}: {name!r} is no distribution that a file may name; upgrade riemvae.")
        value = _construct(known.DISTRIBUTIONS[name], self._arguments(node, path)[0], path)
        self._enter(value, path)
        return value

    def _arguments(
        self, node: dict[str, Any], path: str, names: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Any], set[int]]:
        """The constructor's arguments, and the ids of all objects that they brought."""
        start = len(self._met)
        unknown = set(node["arguments"]) - set(node["arguments"] if names is None else names)
        if unknown:
            raise ValueError(f"{path or 'content'}: unknown arguments {sorted(unknown)}; upgrade riemvae.")
        arguments = {name: self.build(v, child_path(path, name)) for name, v in node["arguments"].items()}
        return arguments, {id(met) for met in self._met[start:]}

    def _restore_state(self, module: nn.Module, node: dict[str, Any], path: str, others: set[int]) -> None:
        for name, part_node in node.get("parts", {}).items():
            part_path = child_path(path, name)
            if name not in module._modules and vars(module).get(name, module) is not None:
                raise ValueError(
                    f"{part_path}: {type(module).__name__} has no place for it; upgrade riemvae."
                )
            part = self.build(part_node, part_path)
            setattr(module, name, part)
            others = others | {id(part)}
        state = dict(node["state"])
        for name, owner, attribute, old in list(local_tensors(module, others)):
            if name not in state:
                raise ValueError(f"{path}: the file has no value for its {name!r}; it is of another riemvae.")
            new = self.tensor(state.pop(name))
            if new.shape != old.shape:
                raise ValueError(
                    f"{path}: its {name!r} has shape {tuple(old.shape)}, and {tuple(new.shape)} in the "
                    f"weights: "
                    "the files do not fit; save again."
                )
            place: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
            place[attribute] = new  # the tensor itself: its dtype and device, and ties to other modules
        if state:
            raise ValueError(f"{path}: {type(module).__name__} has no {sorted(state)[0]!r}; upgrade riemvae.")
        for _, part in local_modules(module, others):
            part.training = node["training"]


def _construct(cls: type, arguments: dict[str, Any], path: str) -> Any:
    try:
        return cls(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {cls.__name__} refuses its arguments: {error}") from error
