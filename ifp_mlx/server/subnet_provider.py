"""The sub-networks that requests ask for, where mlx-lm's server has its models."""

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from ifp_mlx.assistant import Assistant
from ifp_mlx.server.catalog import SubnetRequest
from ifp_mlx.server.seen_subnets import SeenSubnets
from ifp_mlx.subnets.subnetwork import SubNetwork

Prepared = tuple[Assistant, Callable[[str], int]]
"""The assistant, and what says how many units of each layer are kept for a task."""

Prepare = Callable[[], Prepared]

UNLOAD = SubnetRequest("dense", "unload")
"""What is asked for when the server was idle for long: nothing stays loaded."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What mlx-lm's ``ResponseGenerator`` reads from its command line, under the same names.

    Attributes:
        decode_concurrency: answers of one sub-network that are made together; 1 makes every answer
            alone.
        prompt_concurrency: prompts that are prefilled together.
        prefill_step_size: tokens of a prompt at a time.
        prompt_cache_bytes: for KV caches of earlier requests, which later ones go on from; in
            memory, and again on disk.
        prompt_cache_folder: where they are kept when the engine stops; None for nowhere.
        keep_alive_s: after so long without a request the model leaves memory; None keeps it.
        kv_bits: None keeps keys and values as they are; quantizing them would turn batching off.
        kv_group_size: of no effect without ``kv_bits``.
        quantized_kv_start: of no effect without ``kv_bits``.
        chat_template_args: passed to the chat template.
    """

    decode_concurrency: int = 8
    prompt_concurrency: int = 8
    prefill_step_size: int = 512
    prompt_cache_bytes: int = 10**9
    prompt_cache_folder: Path | None = None
    keep_alive_s: float | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    chat_template_args: dict[str, Any] = dataclasses.field(default_factory=dict)


class SubNetworkProvider:
    """Stands where mlx-lm's server has its ``ModelProvider``: what it loads are sub-networks.

    Only the generation thread calls its methods. It also makes the assistant there: an array that
    another thread's stream has yet to compute cannot be computed here.

    Args:
        prepare: returns the assistant, and K for a task; called again when it is needed after
            ``UNLOAD``.
        options: batching and memory.
        seen: gets the facts of what is loaded.

    Attributes:
        first_assistant: done when ``prepare`` is; holds its exception if it failed.
        is_loaded: whether the assistant is in memory.
        subnet: the sub-network in use.
        model_key: of the KV caches: those of one set of units fit no other.
    """

    def __init__(self, prepare: Prepare, options: EngineOptions, seen: SeenSubnets):
        self.cli_args = options
        self.first_assistant: concurrent.futures.Future[Assistant] = concurrent.futures.Future()
        self.subnet: SubNetwork | None = None
        self.model: Any = None
        self.model_key: bytes | None = None
        self.tokenizer: Any = None
        self.processor = None  # no images
        self.draft_model = None
        self.is_batchable = False
        self._prepare = prepare
        self._seen = seen
        self._assistant: Assistant | None = None
        self._num_kept_units: Callable[[str], int] | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the assistant is in memory."""
        return self._assistant is not None

    def load_default(self) -> None:
        """Make the assistant; called once, when the generation thread begins."""
        try:
            assistant = self._make_assistant()
            self.tokenizer = assistant.tokenizer
            # mlx-lm asks before it loads a model. Sub-networks of one are of one kind, which is
            # known without the weights: of a model that does not fit they must not be loaded.
            self.is_batchable = self.cli_args.decode_concurrency > 1 and all(
                hasattr(layer, "merge") for layer in make_prompt_cache(assistant.skeleton)
            )
        except BaseException as error:  # who waits for the assistant must learn of it
            self.first_assistant.set_exception(error)
        else:
            self.first_assistant.set_result(assistant)

    def load(self, choice: SubnetRequest, adapter: str, draft: str) -> tuple[Any, Any]:
        """Make a sub-network the one in use; return its model and the tokenizer.

        For ``UNLOAD`` it returns no model: mlx-lm's loop then lets go of the last one, too.

        Raises:
            IFPError: it cannot be selected or cut.
        """
        self.reset()
        if choice is UNLOAD:
            self._assistant = None
            self.first_assistant = concurrent.futures.Future()  # it holds the assistant, too
            return None, self.tokenizer
        assistant = self._assistant or self._make_assistant()
        if choice.kind == "dense":
            subnet = assistant.dense()
        else:
            assert self._num_kept_units is not None
            kept = (
                self._num_kept_units(choice.text)
                if choice.keep is None
                else assistant.amounts.nearest(choice.keep)
            )
            subnet = assistant.subnetwork_for_task(choice.text, kept)
        self._seen.add(choice, subnet)
        identity = json.dumps(assistant.kv_identity(subnet), sort_keys=True)
        self.subnet = subnet
        self.model = self._seen.watched(choice, subnet)
        self.model_key = hashlib.sha256(identity.encode()).digest()
        return self.model, self.tokenizer

    def reset(self) -> None:
        """Let go of the model."""
        self.subnet = self.model = self.model_key = None

    def _make_assistant(self) -> Assistant:
        assistant, self._num_kept_units = self._prepare()
        self._assistant = assistant
        return assistant
