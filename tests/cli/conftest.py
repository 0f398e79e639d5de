"""A tiny checkpoint that answers in readable words, and a way to run ``ifp`` in this process."""

import dataclasses
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Every word once: the model's next token depends on the last one alone.
WORDS = (
    "Alpha bravo **charlie** delta echo foxtrot golf hotel india juliet kilo lima mike november "
    "oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu done."
)
_SPECIAL = ["<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def word_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer in which each of ``WORDS`` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS.replace(" ", "  ").replace("  ", " ")], trainer)
    return tokenizer


def write_word_model(folder: Path, *, context_length: int = 4096, endless: bool = False) -> Path:
    """Write a llama checkpoint whose greedy answer to everything is ``WORDS``.

    Args:
        folder: created.
        context_length: of the config.
        endless: begin again after the last word instead of ending the answer.
    """
    from mlx_lm.models.llama import Model, ModelArgs

    tokenizer = word_tokenizer()
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": context_length,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        **_SIZES,
    }
    model = Model(ModelArgs.from_dict(config))
    generator = np.random.default_rng(3)
    weights = {
        name: mx.array(0.02 * generator.standard_normal(array.shape), dtype=mx.float32)
        for name, array in dict(tree_flatten(model.parameters())).items()
    }
    for name in weights:
        if "norm" in name:
            weights[name] = mx.ones_like(weights[name])
    embeddings = generator.standard_normal(weights["lm_head.weight"].shape)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    head = np.zeros_like(embeddings)
    # Logits are largest for the successor of the last token: its row holds that token's embedding.
    chain = [tokenizer.token_to_id("Ċ"), *tokenizer.encode(WORDS).ids]
    assert len(set(chain)) == len(chain)
    end = chain[1] if endless else tokenizer.token_to_id("<|im_end|>")
    for token, successor in zip(chain, [*chain[1:], end], strict=True):
        head[successor] += 8.0 * embeddings[token]
    weights["model.embed_tokens.weight"] = mx.array(embeddings, dtype=mx.float32)
    weights["lm_head.weight"] = mx.array(head, dtype=mx.float32)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "chat_template": _CHAT_TEMPLATE,
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that answers ``WORDS``."""
    return write_word_model(tmp_path_factory.mktemp("models") / "words")


@pytest.fixture(scope="session")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that answers ``WORDS`` and has room for a few turns only."""
    folder = tmp_path_factory.mktemp("models") / "short"
    return write_word_model(folder, context_length=256)


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that answers ``WORDS`` over and over."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    return write_word_model(folder, context_length=200_000, endless=True)


@pytest.fixture
def small_model(tiny_checkpoint: Callable[..., Path]) -> Path:
    """Return a checkpoint with random weights, whose answers depend on the prompt."""
    return tiny_checkpoint(name="small")


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Return prompts of different length."""
    return ["hi", "Write a haiku about the sea.", "2+2", "def f(x):\n    return", "ä ö ü?"]


@pytest.fixture(scope="session")
def words() -> str:
    """Return what ``word_model`` answers."""
    return WORDS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one command line did."""

    code: int
    stdout: str
    stderr: str


class _PipedInput(io.TextIOWrapper):
    """Standard input that is a pipe with this content."""

    def __init__(self, file: io.BufferedReader):
        super().__init__(file, encoding="utf-8", errors="surrogateescape")


@pytest.fixture
def ifp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Return a function that runs ``ifp`` with its own home folder.

    The keyword ``stdin`` is what is piped in; without it standard input is the null device.
    """
    monkeypatch.setenv("IFP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("IFP_NO_OPENBLAS", "1")  # loaded before mlx was; no advice without it
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Outcome:
        from ifp_mlx.cli.app import run as run_ifp

        source = Path("/dev/null")
        if stdin is not None:
            source = tmp_path / "stdin"
            source.write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
        with source.open("rb") as file:
            monkeypatch.setattr(sys, "stdin", _PipedInput(file))
            code = run_ifp([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def open_ifp(tmp_path: Path) -> Callable[..., AbstractContextManager[Any]]:
    """Return a function that runs ``ifp`` on a terminal, with its own home folder."""
    # Test folders are no packages: the module beside this one is loaded by its path.
    path = Path(__file__).with_name("terminal.py")
    spec = importlib.util.spec_from_file_location("ifp_test_terminal", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def open_it(*arguments: str | Path, **options: Any) -> AbstractContextManager[Any]:
        opened: AbstractContextManager[Any] = module.terminal(
            *arguments, **{"IFP_HOME": str(tmp_path / "home"), **options}
        )
        return opened

    return open_it
