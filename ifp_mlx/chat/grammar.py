"""What an answer must look like, enforced while it is decoded: JSON, a JSON schema, calls of tools.

llguidance says which tokens may come next; all others become impossible. It does so while the model
computes, so that little time is lost. Near the limit of an answer's length, what is open is closed:
an answer that ends is worth more than one that says everything.
"""

import dataclasses
import functools
import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # mlx-lm takes seconds to import
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models write JSON. Free spacing lets small models write blanks without end."""

Mask = np.ndarray[Any, np.dtype[Any]]

_CLOSERS = ('"', "}", "]", ",")
"""What ends something, in this order: in a string, brackets are text."""

_NEAR_TOKENS = 32  # about what one more token may open, beside all that a whole answer has
_NUM_CANDIDATES = 4
_NUM_TRIES = 3


@dataclasses.dataclass(frozen=True)
class Calls:
    """Calls of functions in an answer.

    Attributes:
        start: the marker before a call.
        end: the marker after it.
        schemas: name -> JSON schema of the arguments, of a model that writes calls as JSON; None
            for another form, of which only the marker can be enforced.
        must_call: there is a call, and no text.
        in_parallel: there may be several.
    """

    start: str
    end: str
    schemas: Mapping[str, Any] | None
    must_call: bool
    in_parallel: bool


class Grammars:
    """Makes grammars for the tokens of one model.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: "TokenizerWrapper"):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def for_schema(self, schema: Mapping[str, Any]) -> "Grammar":
        """Return the grammar of JSON that fits a schema.

        Raises:
            UsageError: it is no schema, or has what cannot be enforced.
        """
        return self._grammar(f"%llguidance {{}}\nstart: {_json_rule(schema)}\n")

    def for_calls(
        self, calls: "Calls", schema: Mapping[str, Any] | None = None
    ) -> "Grammar | None":
        """Return the grammar of answers that may call functions.

        Args:
            calls: of which functions, and in which form.
            schema: of an answer that calls none; None for any text.

        Returns:
            None if any text is allowed.

        Raises:
            UsageError: a schema is none, or has what cannot be enforced.
        """
        start, end = self._terminal(calls.start), self._terminal(calls.end)
        rules = [r"TEXT: /(.|\n)*/"]
        if calls.schemas is None:
            several = "call"
            rules.append(f"call: {start} TEXT")
        else:
            several = 'call ("\\n" call)*' if calls.in_parallel else "call"
            functions = [_function_rule(*function) for function in calls.schemas.items()]
            rules.append(f"call: {start} body")
            rules.append(f'body: "\\n" function "\\n" {end}')
            rules.append(f"function: {' | '.join(functions)}")
        if calls.must_call:
            rules.append(f"start: {several}")
        elif schema is not None:
            rules += [f"start: answer | {several}", f"answer: {_json_rule(schema)}"]
        elif calls.schemas is None:
            return None
        else:
            rules.append(f"start: {'told*' if calls.in_parallel else 'told?'} TEXT")
            if self._is_special(calls.start):
                rules.append(f"told: TEXT {start} body")
            else:  # up to where the marker is complete
                rules += [f"head[lazy]: TEXT {start}", "told: head body"]
        return self._grammar("\n".join(["%llguidance {}", *rules, ""]))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, which may be part of a character."""
        return self._tokens.decode_bytes([token])

    @functools.cached_property
    def _tokens(self) -> LLTokenizer:
        """What llguidance needs of the tokenizer; takes a second for a large vocabulary."""
        backend = self._tokenizer.backend_tokenizer.to_str()
        return LLTokenizer(backend, eos_token=sorted(self._tokenizer.eos_token_ids))

    def _is_special(self, marker: str) -> bool:
        tokens = self._tokenizer.encode(marker, add_special_tokens=False)
        return len(tokens) == 1 and self._tokens.is_special_token(tokens[0])

    def _terminal(self, marker: str) -> str:
        return marker if self._is_special(marker) else _literal(marker)

    def _grammar(self, rules: str) -> "Grammar":
        with self._lock:  # of several requests, one makes what all need
            tokens = self._tokens
        matcher = LLMatcher(tokens, rules, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the schema cannot be enforced: {_first_line(matcher.get_error())}")
        closers = [ids[0] for text in _CLOSERS if len(ids := tokens.tokenize_str(text)) == 1]
        return Grammar(matcher, closers, sorted(self._tokenizer.eos_token_ids))


class Grammar:
    """Which answers are allowed. Use ``Grammars``.

    Args:
        matcher: at the beginning of an answer.
        closers: tokens that end something, in the order of preference.
        end_ids: tokens that end the answer.
    """

    def __init__(self, matcher: LLMatcher, closers: Sequence[int], end_ids: Sequence[int]):
        self._matcher = matcher
        self._closers = list(closers)
        self._end_ids = list(end_ids)

    def processor(self, max_tokens: int, begins_after: Sequence[int] = ()) -> "GrammarProcessor":
        """Return what enforces it for one answer.

        Args:
            max_tokens: longest answer.
            begins_after: tokens; what comes before and with them is free.
        """
        matcher = self._matcher.deep_copy()
        return GrammarProcessor(matcher, self._closers, self._end_ids, max_tokens, begins_after)


class GrammarProcessor:
    """A logits processor of mlx-lm that makes what a grammar does not allow impossible.

    Called with the tokens so far and the logits of the next one; what it was first called with is
    the prompt.

    Attributes:
        error: why it could not go on; empty if it could.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        closers: Sequence[int],
        end_ids: Sequence[int],
        max_tokens: int,
        begins_after: Sequence[int],
    ):
        self.error = ""
        self._matcher = matcher
        self._closers = closers
        self._end_ids = end_ids
        self._left = max_tokens
        self._begins_after = list(begins_after)
        self._latest: list[int] = []
        self._has_begun = False
        self._shortest = 0  # tokens of a whole answer
        self._plan: list[int] | None = None
        self._plans: dict[int, list[int]] = {}  # by the token that comes next
        self._chance = np.random.default_rng(0)
        self._next_check = max_tokens  # when so many tokens are left

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return the logits of the next token. Evaluates the last token."""
        mx.async_eval(logits)  # the model computes while we find out what may come
        if self._has_begun:
            self._take(cast(int, tokens[-1].item()))
        self._has_begun = True
        if self._begins_after:
            return logits
        try:
            allowed = self._allowed(logits.shape[-1])
            if self._left <= self._next_check:
                self._leave_room(allowed, logits)
        except Exception as error:  # other answers are made on this thread, too: end this one
            self.error = self.error or f"{type(error).__name__}: {error}"
            allowed = self._only_end(logits.shape[-1])
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def _take(self, token: int) -> None:
        self._left -= 1
        self._plan, self._plans = self._plans.get(token), {}
        if self._begins_after:
            self._latest = [*self._latest, token][-len(self._begins_after) :]
            if self._latest == self._begins_after:
                self._begins_after = []
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def _allowed(self, num_tokens: int) -> Mask:
        """Return which tokens may come next: those that end the answer if no other may."""
        allowed = np.zeros(num_tokens, np.bool_)
        if not self._matcher.is_stopped():
            mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[:num_tokens]
            allowed[: len(mask)] = mask != 0
        if self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())
        if self._matcher.is_stopped() or not allowed.any():
            return self._only_end(num_tokens)
        return allowed

    def _only_end(self, num_tokens: int) -> Mask:
        allowed = np.zeros(num_tokens, np.bool_)
        allowed[self._end_ids] = True
        return allowed

    def _leave_room(self, allowed: Mask, logits: mx.array) -> None:
        """Leave only tokens after which what is open can still be closed in time.

        A plan is kept: tokens that complete the answer. A token that the model would like is left
        if there is a plan for what follows it; if there is none for any, the next of the plan is
        due. That takes a while. What is open grows slowly, so it is done in each step only when
        little more is left than what a whole answer takes at least.
        """
        if self._matcher.is_stopped() or self._matcher.is_accepting():
            return
        room = self._left - 1  # the last token is the one that ends the answer
        plan = self._plan or self._make_plan(self._matcher, room)
        if plan is None:
            self._next_check = self._left - max(room // 4, 1)
            return
        self._shortest = self._shortest or len(plan)
        spare = room - len(plan) - 2 * self._shortest - _NEAR_TOKENS
        if spare > 0:
            self._next_check = self._left - max(spare // 4, 1)
            return
        scores = np.where(allowed, np.array(logits.astype(mx.float32)).reshape(-1), -np.inf)
        for token in np.argsort(scores)[: -_NUM_CANDIDATES - 1 : -1]:
            if allowed[token]:
                matcher = self._matcher.deep_copy()
                matcher.consume_token(int(token))
                if (follows := self._make_plan(matcher, room - 1)) is not None:
                    self._plans[int(token)] = follows
        if not self._plans:
            self._plans[plan[0]] = plan[1:]
        allowed[:] = False
        allowed[list(self._plans)] = True

    def _make_plan(self, matcher: LLMatcher, max_tokens: int) -> list[int] | None:
        """Return tokens that complete the answer, few of them; None if none were found."""
        plans = [self._try_to_complete(matcher.deep_copy(), max_tokens) for _ in range(_NUM_TRIES)]
        return min((plan for plan in plans if plan is not None), key=len, default=None)

    def _try_to_complete(self, matcher: LLMatcher, max_tokens: int) -> list[int] | None:
        plan: list[int] = []
        while not (matcher.is_accepting() or matcher.is_stopped()):
            tokens = matcher.compute_ff_tokens()
            if not tokens:
                allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8)
                if not allowed.any():  # too complex to go on
                    return None
                closing = (token for token in self._closers if allowed[token])
                token = next(closing, None)
                # Where there is a choice that closes nothing, such as of a key, any may be long.
                tokens = [self._chance.choice(np.flatnonzero(allowed)) if token is None else token]
            plan += map(int, tokens)
            if len(plan) > max_tokens or not matcher.consume_tokens(plan[-len(tokens) :]):
                return None
        return plan


def _json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """Return the rule for JSON that fits a schema; ``lenient`` ignores what cannot be enforced."""
    return f"%json {json.dumps({**schema, 'x-guidance': {**_SPACING, 'lenient': lenient}})}"


def _function_rule(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the rule for a call of a function: each schema stands alone, with its own $defs."""
    beginning = _literal(f'{{"name": {json.dumps(name)}, "arguments": ')
    return f"{beginning} {_json_rule(arguments, lenient=True)} {_literal('}')}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
