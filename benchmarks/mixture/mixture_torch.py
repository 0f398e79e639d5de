"""A llama whose feed-forward layers are mixtures of experts, in PyTorch, and its checkpoints.

The layout is mixtral's: a router without bias, the k largest logits, softmax over the chosen,
experts w1, w2, w3, tied embeddings. A dense llama is the mixture with one expert.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model; ``ffn`` is an expert's, ``slices`` experts hold one dense layer."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    experts: int = 1
    top_k: int = 1
    slices: int = 1
    rope_theta: float = 1e5
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden // self.heads


def expert_products_loop(x: Tensor, w13: Tensor, w2: Tensor, ends: Tensor) -> Tensor:
    """Return the experts' outputs for tokens sorted by expert, one expert after the other.

    Args:
        x: (N, D), sorted by expert.
        w13: (E, 2F, D), gate rows above up rows.
        w2: (E, D, F).
        ends: (E,) int32, where each expert's tokens end.
    """
    parts = []
    start = 0
    for expert, end in enumerate(ends.tolist()):
        gate, up = F.linear(x[start:end], w13[expert]).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up, w2[expert]))
        start = end
    return torch.cat(parts)


def expert_products_grouped(x: Tensor, w13: Tensor, w2: Tensor, ends: Tensor) -> Tensor:
    """Return the same as ``expert_products_loop`` with two grouped products."""
    gate, up = _grouped_mm(x, w13.transpose(-2, -1), ends).chunk(2, dim=-1)
    return _grouped_mm(F.silu(gate) * up, w2.transpose(-2, -1), ends)


def _grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    if hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, w, offs=ends)
    return torch._grouped_mm(x, w, offs=ends)


class _Dispatch(torch.autograd.Function):
    """Rows of tokens, one for every choice, sorted by expert; both ways are gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """Rows sorted by expert back in the order of tokens and choices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[inverse]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return grad[order], None, None


class RMSNorm(nn.Module):
    """RMS normalisation, computed in float32, returned in the type of its input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Layer(nn.Module):
    """Attention and a mixture of experts; weights are float32, products in the input's type."""

    grouped = True  # whether grouped products are used; the loop over experts otherwise

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, kv = shape.hidden, shape.kv_heads * shape.head_dim
        self.input_norm = RMSNorm(d, shape.norm_eps)
        self.post_norm = RMSNorm(d, shape.norm_eps)
        self.qkv = nn.Parameter(torch.empty(d + 2 * kv, d))
        self.o = nn.Parameter(torch.empty(d, d))
        self.router = nn.Parameter(torch.zeros(shape.experts, d))
        self.w13 = nn.Parameter(torch.empty(shape.experts, 2 * shape.ffn, d))
        self.w2 = nn.Parameter(torch.empty(shape.experts, d, shape.ffn))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x plus its causal self-attention; x is (B, T, D)."""
        shape, (b, t, d) = self.shape, x.shape
        kv = shape.kv_heads * shape.head_dim
        mixed = F.linear(self.input_norm(x), self.qkv.to(x.dtype))
        q, k, v = mixed.split([d, kv, kv], dim=-1)
        q = _rotate(q.view(b, t, shape.heads, shape.head_dim).transpose(1, 2), cos, sin)
        k = _rotate(k.view(b, t, shape.kv_heads, shape.head_dim).transpose(1, 2), cos, sin)
        v = v.view(b, t, shape.kv_heads, shape.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + F.linear(y.transpose(1, 2).reshape(b, t, d), self.o.to(x.dtype))

    def units(self, y: Tensor) -> Tensor:
        """Return the (N, F) units' activations of the first expert; all of a dense layer."""
        gate, up = F.linear(y, self.w13[0].to(y.dtype)).chunk(2, dim=-1)
        return F.silu(gate) * up

    def mix(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the experts' mixture of normalised tokens, balance loss and statistics.

        Args:
            y: (N, D).

        Returns:
            (N, D); the load-balancing loss, 1 for even loads; (E + 1,) loads and the mean number
            of distinct slices among a token's experts.
        """
        shape = self.shape
        w13, w2 = self.w13.to(y.dtype), self.w2.to(y.dtype)
        if shape.experts == 1:
            zero = torch.zeros((), device=y.device)
            return F.linear(self.units(y), w2[0]), zero, torch.ones(2, device=y.device)
        logits = F.linear(y.float(), self.router)
        chosen, indices = logits.topk(shape.top_k, dim=-1)
        weights = chosen.softmax(dim=-1)
        flat = indices.flatten()
        ranked, order = flat.sort(stable=True)
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=y.device)
        )
        experts = torch.arange(shape.experts, device=y.device)
        ends = torch.searchsorted(ranked, experts, right=True)
        products = expert_products_grouped if self.grouped else expert_products_loop
        x = _Dispatch.apply(y, order, inverse, shape.top_k)
        out = _Collect.apply(products(x, w13, w2, ends.to(torch.int32)), order, inverse)
        out = out.view(-1, shape.top_k, shape.hidden)
        mixture = (out * weights.to(y.dtype)[..., None]).sum(1)
        loads = torch.diff(ends, prepend=ends.new_zeros(1)).float() / len(flat)
        balance = shape.experts * (loads * logits.softmax(dim=-1).mean(0)).sum()
        distinct = F.one_hot(indices % shape.slices, shape.slices).amax(1).sum(-1).float().mean()
        return mixture, balance, torch.cat([loads, distinct[None]])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output, balance loss and statistics; x is (B, T, D)."""
        h = self.attend(x, cos, sin)
        mixture, balance, statistics = self.mix(self.post_norm(h).flatten(0, 1))
        return h + mixture.view_as(h), balance, statistics


class Mixture(nn.Module):
    """A model; experts of one dense layer's slices s = 0.. are numbered variant * slices + s."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocab, shape.hidden))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings (B, T, D) and the rotation's cosines and sines."""
        half = self.shape.head_dim // 2
        device = tokens.device
        rates = self.shape.rope_theta ** -(torch.arange(half, device=device).float() / half)
        angles = torch.arange(tokens.shape[1], device=device).float()[:, None] * rates
        return F.embedding(tokens, self.embedding).to(dtype), angles.cos(), angles.sin()

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return last hidden states (B, T, D), mean balance loss and (L, E + 1) statistics."""
        x, cos, sin = self.embed(tokens, dtype)
        balances, statistics = [], []
        for layer in self.layers:
            x, balance, numbers = layer(x, cos, sin)
            balances.append(balance)
            statistics.append(numbers.detach())
        return self.norm(x), torch.stack(balances).mean(), torch.stack(statistics)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def read_packed(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the float32 weights and the config of an MLX checkpoint, unpacked (affine only)."""
    config = json.loads((folder / "config.json").read_text())
    packing = config.get("quantization") or {}
    arrays: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        arrays.update(load_file(path))
    weights: dict[str, Tensor] = {}
    for name, value in arrays.items():
        base = name.rpartition(".")[0]
        if name.endswith((".scales", ".biases")):
            continue
        if f"{base}.scales" in arrays:
            bits = (packing.get(base) or packing)["bits"]
            value = unpack(value, arrays[f"{base}.scales"], arrays[f"{base}.biases"], bits)
        weights[name] = value.float()
    return weights, config


def unpack(codes: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Return the float32 values of affine codes (uint32 words, the lowest bits first)."""
    octets = codes.contiguous().view(torch.uint8)
    values = octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)
    if bits not in (4, 8):
        raise ValueError(f"{bits}-bit codes are not unpacked here, only 4 and 8")
    grouped = values.view(*scales.shape, -1).float()
    return (grouped * scales.float()[..., None] + biases.float()[..., None]).flatten(-2)


def dense_model(weights: dict[str, Tensor], config: dict[str, Any]) -> Mixture:
    """Return a dense llama as a mixture of one expert."""
    shape = Shape(
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        vocab=config["vocab_size"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
    model = Mixture(shape)
    with torch.no_grad():
        model.embedding.copy_(weights["model.embed_tokens.weight"])
        model.norm.weight.copy_(weights["model.norm.weight"])
        for index, layer in enumerate(model.layers):
            prefix = f"model.layers.{index}."
            layer.input_norm.weight.copy_(weights[prefix + "input_layernorm.weight"])
            layer.post_norm.weight.copy_(weights[prefix + "post_attention_layernorm.weight"])
            heads = [weights[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
            layer.qkv.copy_(torch.cat(heads))
            layer.o.copy_(weights[prefix + "self_attn.o_proj.weight"])
            gate, up = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up"))
            layer.w13[0].copy_(torch.cat([gate, up]))
            layer.w2[0].copy_(weights[prefix + "mlp.down_proj.weight"])
    return model


def grow(
    dense: Mixture, experts: int, slices: int, num_common: int, unit_orders: list[Tensor]
) -> Mixture:
    """Return the mixture that starts as a dense model: each slice ``experts / slices`` times.

    The most important units of a layer are in every slice, the others in one each, dealt out by
    importance. The weights of a token's experts sum to one, so what is in one slice only is
    multiplied by the number of slices. Routers are zero.

    Args:
        dense: a mixture of one expert.
        experts: a layer.
        slices: of a layer, each an expert's units; also the number of experts a token uses.
        num_common: units that every slice holds.
        unit_orders: per layer (F,) indices, the most important unit first.
    """
    num_own = (dense.shape.ffn - num_common) // slices
    if num_own * slices + num_common != dense.shape.ffn:
        raise ValueError(f"{dense.shape.ffn - num_common} units do not part into {slices} slices")
    shape = dataclasses.replace(
        dense.shape, ffn=num_common + num_own, experts=experts, top_k=slices, slices=slices
    )
    model = Mixture(shape)
    own = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("router", "w13", "w2")):
                parameter.copy_(own[name])
        for source, layer, order in zip(dense.layers, model.layers, unit_orders, strict=True):
            gate, up = source.w13[0].chunk(2)
            for s in range(slices):
                units = torch.cat([order[:num_common], order[num_common + s :: slices]])
                factor = torch.full((len(units),), float(slices), device=units.device)
                factor[:num_common] = 1.0
                layer.w13[s::slices] = torch.cat([gate[units], up[units]])
                layer.w2[s::slices] = source.w2[0][:, units] * factor
    return model


def write_checkpoint(
    model: Mixture, source: Path, source_config: dict[str, Any], folder: Path
) -> None:
    """Write a bfloat16 checkpoint folder whole: mixtral's layout, or llama's for one expert."""
    shape = model.shape
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    state = {
        name: value.detach().to("cpu", torch.bfloat16) for name, value in model.named_parameters()
    }
    arrays = {
        "model.embed_tokens.weight": state["embedding"],
        "model.norm.weight": state["norm.weight"],
    }
    kv = shape.kv_heads * shape.head_dim
    for index in range(shape.layers):
        own, prefix = f"layers.{index}.", f"model.layers.{index}."
        arrays[prefix + "input_layernorm.weight"] = state[own + "input_norm.weight"]
        arrays[prefix + "post_attention_layernorm.weight"] = state[own + "post_norm.weight"]
        for name, part in zip("qkv", state[own + "qkv"].split([shape.hidden, kv, kv]), strict=True):
            arrays[f"{prefix}self_attn.{name}_proj.weight"] = part
        arrays[prefix + "self_attn.o_proj.weight"] = state[own + "o"]
        w13, w2 = state[own + "w13"], state[own + "w2"]
        if shape.experts == 1:
            for name, part in (
                ("gate", w13[0, : shape.ffn]),
                ("up", w13[0, shape.ffn :]),
                ("down", w2[0]),
            ):
                arrays[f"{prefix}mlp.{name}_proj.weight"] = part
            continue
        arrays[prefix + "block_sparse_moe.gate.weight"] = state[own + "router"]
        for expert in range(shape.experts):
            base = f"{prefix}block_sparse_moe.experts.{expert}."
            arrays[base + "w1.weight"] = w13[expert, : shape.ffn]
            arrays[base + "w2.weight"] = w2[expert]
            arrays[base + "w3.weight"] = w13[expert, shape.ffn :]
    arrays = {name: value.contiguous() for name, value in arrays.items()}
    save_file(arrays, staging / "model.safetensors", metadata={"format": "pt"})
    config = {
        key: value
        for key, value in source_config.items()
        if not key.startswith("quantization") and key not in ("mlp_bias", "attention_bias")
    }
    config |= {"torch_dtype": "bfloat16", "intermediate_size": shape.ffn}
    if shape.experts > 1:
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "sliding_window": None,
        }
    (staging / "config.json").write_text(json.dumps(config, indent=2))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        if (source / name).exists():
            shutil.copy(source / name, staging / name)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
