"""``save`` and ``load``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from riemvae._checks import argument_error
from riemvae._recipe import is_recipe
from riemvae._seeding import kept_generators
from riemvae.persistence import known
from riemvae.persistence.description import Description
from riemvae.persistence.files import read_folder, write_folder
from riemvae.persistence.rebuilding import Rebuilding

Folder = str | os.PathLike[str]
_PAIR = "pair"


def save(folder: Folder, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    """Writes a model and its guide: weights as safetensors, everything else as JSON.

    Objects are described by the constructor arguments of riemvae's classes, of plain ``torch.nn`` layers and
    of common distributions of torch and Pyro. A function, or an object of any other class, is code, which is
    not stored: its weights are (a module's ``state_dict``), and :func:`load` asks for the object itself.
    Buffers, frozen metrics, dtypes, training modes, frozen parameters and what is shared between model and
    guide come back as they were.

    If the model or the guide is a plain function, Pyro's parameter store is written too, but for the
    parameters of modules that are saved anyway; :func:`load` puts these entries back. A function that
    registers a network of its own with ``pyro.module`` gets its weights from there only with
    ``update_module_params=True``.

    Writing is atomic: both files are written beside ``folder`` and renamed, so that an earlier save there is
    replaced by a whole one or not at all.

    Args:
        folder: Where to write. It may not exist, be empty, or be an earlier save, which is replaced.
        model: The model.
        guide: Its guide.

    Raises:
        ValueError: ``folder`` is a file or holds something else; an object that could not be rebuilt, such
            as a registered network whose layers were exchanged afterwards.

    Example:
        >>> import tempfile, riemvae as rv
        >>> vae = rv.VAE(rv.networks.MLPDecoder(2, 5), latent_dim=2)
        >>> guide = rv.guides.GaussianGuide(vae, rv.networks.MLPEncoder(5, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, vae, guide)
        ...     vae2, guide2 = load(folder)
        >>> guide2.model is vae2, bool((vae2.decoder(torch.ones(2)) == vae.decoder(torch.ones(2))).all())
        (True, True)
    """
    for name, value in (("model", model), ("guide", guide)):
        if not callable(value):
            raise argument_error(name, "a module or a function", value)
    _save(folder, {"model": model, "guide": guide}, _PAIR)


def save_recipe(folder: Folder, obj: Any, kind: str) -> None:
    """Writes one object of a registered class, which :func:`load` then returns.

    Args:
        folder: As for :func:`save`.
        obj: The object.
        kind: What the file says that it is, such as ``"autoencoder"``.

    Raises:
        ValueError: An object of another class, and what :func:`save` raises.

    Example:
        >>> import tempfile
        >>> from riemvae.data import Affine
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_recipe(folder, Affine(0.5), kind="preprocessing")
        ...     load(folder)
        Affine(scale=0.5, offset=0)
    """
    if not is_recipe(obj):
        raise argument_error(
            "obj", "an instance of exactly a registered class", obj, "save its model and guide with save(...)"
        )
    if not isinstance(kind, str) or kind == _PAIR:
        raise argument_error("kind", f"a word other than {_PAIR!r}", kind)
    _save(folder, obj, kind)


def _save(folder: Folder, root: Any, kind: str) -> None:
    description = Description(root)
    store = _describe_param_store(description)
    tensors = {name: value.to("cpu", copy=True).contiguous() for name, value in description.tensors.items()}
    for name, value in tensors.items():
        if value.dtype not in known.DTYPES.values():
            raise ValueError(f"{name}: expected a dtype that files can hold, got {value.dtype}; convert it.")
    _check_rebuilt(description, tensors)
    content = {
        "kind": kind,
        "content": description.root,
        "tensors": description.kinds,
        "custom": description.customs,
        "param_store": store,
    }
    write_folder(folder, content, tensors)


def _check_rebuilt(description: Description, tensors: Mapping[str, Tensor]) -> None:
    """Builds everything once, so that what cannot be loaded is found while it is still there."""
    rebuilding = Rebuilding(
        tensors, description.kinds, description.customs, description.custom_objects, restore=False
    )
    try:
        with kept_generators():  # constructors draw initial weights
            rebuilding.build(description.root, "")
    except ValueError as error:
        raise ValueError(f"cannot be saved, because it could not be rebuilt: {error}") from error
    for path, live in description.objects.items():
        if path in description.customs or not isinstance(live, nn.Module):
            continue
        with kept_generators():  # some modules draw numbers to describe themselves
            made, was = _layers(rebuilding.objects[path]), _layers(live)
        if made != was:
            changed = sorted(name for name in made.keys() | was.keys() if made.get(name) != was.get(name))
            raise ValueError(
                f"{path or 'object'}: cannot be saved, because this {type(live).__name__} was changed after "
                f"it was made, at {changed[0] or 'itself'!r}; use the changed network in a class of your own."
            )


def _layers(module: nn.Module) -> dict[str, tuple[type, str]]:
    return {name: (type(part), part.extra_repr()) for name, part in module.named_modules()}


@torch.inference_mode(False)  # what is loaded there could not be trained
def load(folder: Folder, modules: Mapping[str, Any] | None = None, device: Any = None) -> Any:
    """Reads what :func:`save` wrote; no code is run that the file brings.

    Pyro's own ``SVI`` finds parameters by name. To go on training with it in a process that has trained
    modules of the same names, call ``pyro.clear_param_store()`` first; :func:`riemvae.fit` needs no such
    thing.

    Args:
        folder: The folder.
        modules: The user's own functions and modules that the save refers to, by the paths where they were,
            such as ``{"model.decoder": network, "guide.encoder": encoder}``. Modules get the saved weights,
            in place.
        device: Where the tensors shall be; None is the CPU, wherever they were.

    Returns:
        ``(model, guide)``; or the one object, for a folder that an ``Autoencoder`` wrote.

    Raises:
        ValueError: No such folder, a foreign or a newer file, a truncated or an altered one, a class that is
            not known, objects that are missing in ``modules`` (all are listed), names in it that nothing
            asks for, a module whose shapes do not fit.

    Example:
        >>> import tempfile, riemvae as rv
        >>> vae = rv.VAE(rv.networks.MLPDecoder(2, 5), latent_dim=2)
        >>> guide = rv.guides.GaussianGuide(vae, lambda x: (x[:, :2], 1 + x[:, :2] ** 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, vae, guide)
        ...     vae2, guide2 = load(folder, modules={"guide.encoder": guide.encoder})
        >>> guide2.encoder is guide.encoder
        True
    """
    try:
        target = torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise argument_error(
            "device", "a device of this machine", repr(device), str(error).split("\n")[0]
        ) from None
    config, tensors = read_folder(folder)
    modules = {} if modules is None else dict(modules)
    try:
        customs, kinds, content = config["custom"], config["tensors"], config["content"]
        _check_modules(customs, modules)
        tensors = {name: value.to(target) for name, value in tensors.items()}
        rebuilding = Rebuilding(tensors, kinds, customs, modules)
        with kept_generators():
            for path, custom in customs.items():
                if isinstance(modules[path], nn.Module) and custom.get("state") is not None:
                    modules[path].to(target)
            rebuilding.hand_back()
            result = rebuilding.build(content, "")
            if config["kind"] == _PAIR:
                result = result["model"], result["guide"]
            _restore_param_store(config["param_store"], rebuilding)
    except ValueError as error:
        raise ValueError(f"{os.fspath(folder)}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(folder)}: the description is damaged ({type(error).__name__}: {error}); save again."
        ) from error
    return result


def _check_modules(customs: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    missing = [path for path in customs if path not in modules]
    if missing:
        listed = ", ".join(f"{path!r} ({customs[path]['class']})" for path in missing)
        raise ValueError(
            f"modules: expected {listed}, which are code and not stored, got {sorted(modules) or 'none'}; "
            f"pass load(folder, modules={{{missing[0]!r}: ...}})."
        )
    unknown = sorted(set(modules) - set(customs))
    if unknown:
        raise ValueError(
            f"modules: expected {sorted(customs) or 'none'}, got also {unknown}; leave these out."
        )


def _describe_param_store(description: Description) -> dict[str, Any]:
    """Pyro's parameters, where the model or the guide is a function, which keeps its own there."""
    tops = (description.custom_objects.get(path) for path in ("model", "guide"))
    if all(top is None or isinstance(top, nn.Module) for top in tops):
        return {}
    saved = [value for value in description.objects.values() if isinstance(value, nn.Module)]
    owned = {id(parameter) for module in saved for parameter in module.parameters()}
    # By name too: a copy of a guide has other parameters than the store, under the same names.
    names = tuple(f"{m._pyro_name}." for m in saved if isinstance(m, PyroModule) and m._pyro_name)
    state = pyro.get_param_store().get_state()
    entries = {}
    for name, value in state["params"].items():
        if id(value) in owned or name.startswith(names):
            continue
        constraint = known.constraint_node(state["constraints"][name])
        if constraint is None:
            raise ValueError(
                f"pyro.param {name!r}: expected one of the constraints {list(known.CONSTRAINTS)}, got "
                f"{state['constraints'][name]}; transform it in the model."
            )
        entries[name] = {
            "tensor": description.add_tensor(value, f"param_store/{name}"),
            "constraint": constraint,
        }
    return entries


def _restore_param_store(entries: Mapping[str, Any], rebuilding: Rebuilding) -> None:
    networks = sorted({name.split("$$$")[0] for name in entries if "$$$" in name})
    if networks:  # Pyro's module() keeps the values that the network has, whatever the store says
        warnings.warn(
            f"the weights of {networks} are in Pyro's parameter store, and not yet in the networks: register "
            "them with pyro.module(name, network, update_module_params=True)",
            stacklevel=3,
        )
    params = {
        name: rebuilding.tensor(entry["tensor"]).detach().requires_grad_() for name, entry in entries.items()
    }
    restrictions = {name: known.constraint_of(entry["constraint"]) for name, entry in entries.items()}
    pyro.get_param_store().set_state({"params": params, "constraints": restrictions})
