"""Saving and loading: tensors as safetensors, everything else as JSON, and no code in either.

A save is a folder of two files, ``config.json`` and ``weights.safetensors``. The first describes the objects
by their constructor arguments; the second holds every tensor once. Loading builds classes from fixed lists
only: riemvae's own registered ones, plain layers of ``torch.nn`` and distributions of torch and Pyro.
Whatever else a model is made of (a function, a network or a guide of one's own) is left out but for its
weights, and handed back in ``load(modules=...)``.
"""

from riemvae.persistence.saving import load, save, save_recipe

__all__ = ["load", "save", "save_recipe"]
