"""Instruction-Following Pruning for MLX: cut a language model to the task at hand.

Axis letters, used in every shape comment and docstring of this package:

    B batch, T tokens, L layers, D hidden_size, F intermediate_size (dense),
    K kept FFN units a layer, H query heads, G key/value heads, V vocabulary.

An *FFN unit* is row ``i`` of the gate and up projections together with column ``i``
of the down projection. *Dense* is the source model, *compact* the sliced one.
"""

__version__ = "0.1.0"
