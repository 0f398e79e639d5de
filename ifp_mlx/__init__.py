"""Instruction-Following Pruning for MLX: cut a language model to the task at hand.

The public face; everything here is imported when it is first used::

    from pathlib import Path
    from ifp_mlx import Assistant

    assistant = Assistant.load(Path("models/smollm2-135m"))
    subnet = assistant.subnetwork_for_task("help me write Python", num_kept_units=768)
    conversation = assistant.converse(subnet)
    for piece in conversation.reply([{"role": "user", "content": "Reverse a string."}]):
        print(piece, end="", flush=True)

Axis letters, used in every shape comment and docstring of this package:

    B batch, T tokens, L layers that have units, D hidden_size, F units of such a layer,
    K kept units of it, H query heads, G key/value heads, V vocabulary.

A *unit* is something of a model that can be kept or left out; ``units.kinds`` says which there are.
An *FFN unit* is row ``i`` of the gate and up projections together with column ``i`` of the down
projection. *Dense* is the source model, *compact* the sliced one.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.chat.conversation import Conversation
    from ifp_mlx.chat.sampling import KVCacheOptions, SamplingOptions
    from ifp_mlx.errors import IFPError
    from ifp_mlx.selection.selection import Pick, Selection
    from ifp_mlx.selection.spec import SelectorSpec
    from ifp_mlx.slicing.compact import CutOptions, slice_model
    from ifp_mlx.storage.weights import load_model
    from ifp_mlx.subnets.subnetwork import SubNetwork
    from ifp_mlx.subnets.task_cache import TaskCache

__version__ = "0.1.0"

__all__ = [
    "Assistant",
    "Conversation",
    "CutOptions",
    "IFPError",
    "KVCacheOptions",
    "Pick",
    "SamplingOptions",
    "Selection",
    "SelectorSpec",
    "SubNetwork",
    "TaskCache",
    "load_model",
    "slice_model",
]

_HOMES = {
    "Assistant": "assistant",
    "Conversation": "chat.conversation",
    "CutOptions": "slicing.compact",
    "IFPError": "errors",
    "KVCacheOptions": "chat.sampling",
    "Pick": "selection.selection",
    "SamplingOptions": "chat.sampling",
    "Selection": "selection.selection",
    "SelectorSpec": "selection.spec",
    "SubNetwork": "subnets.subnetwork",
    "TaskCache": "subnets.task_cache",
    "load_model": "storage.weights",
    "slice_model": "slicing.compact",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ifp_mlx' has no attribute {name!r}")
    from ifp_mlx.blas import prefer_openblas

    prefer_openblas()  # before anything imports mlx
    return getattr(importlib.import_module(f"ifp_mlx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
