"""A kvjax model for EleutherAI's Language Model Evaluation Harness (`lm_eval`), its cache in any codec.

`lm_eval.simple_evaluate(KVJaxLM(graphdef, params, tokenizer, max_len, through="decode", codec=...), tasks=[...])`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from kvjax.checks import at_least, one_of
from kvjax.codecs.base import Codecs, slot_multiple
from kvjax.data import Tokenizer
from kvjax.decoder import fused
from kvjax.downstream import LikelihoodScorer, Window
from kvjax.evaluate import Through
from kvjax.generate import ROUND_SLOTS, Session, padded
from kvjax.tasks import Request

MAX_GEN_TOKS = 256  # lm_eval's own, where a task does not say
EVERY = 16  # tokens between two looks for stop strings
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature")


@dataclass(frozen=True)
class _Prompt:
    place: int
    ids: np.ndarray
    until: tuple[str, ...]
    num_tokens: int


class KVJaxLM(LM):
    """Log-likelihoods the way `through` says, and greedy text, both by a cache stored with `codec`.

    A request that does not fit `max_len` tokens is a ValueError with its number, never truncated; texts of
    `loglikelihood_rolling` are cut into windows, as lm_eval's own models cut them.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        tokenizer: Tokenizer,
        max_len: int,
        stop_ids: Sequence[int] = (),
        through: Through = "prefill",
        codec: Codecs | None = None,
        batch_size: int = 8,
        track: Callable[[list], Iterable] = iter,
    ):
        """`stop_ids` end generated text, and `batch_size` texts are generated at a time."""
        super().__init__()
        at_least("max_len", max_len, 1)
        at_least("batch_size", batch_size, 1)
        self.graphdef, self.params = fused(graphdef, params, turn=False)  # once for all sessions
        self.tokenizer, self.codec = tokenizer, codec
        self.max_len, self.stop_ids, self.batch_size, self.track = max_len, tuple(stop_ids), batch_size, track
        self.scorer = LikelihoodScorer(graphdef, params, tokenizer, through, codec, max_len)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether greedy decoding would make it."""
        pairs = [Request(*request.args) for request in requests]
        scored = self.scorer.score(pairs, track=self.track)
        answers = [(-nats, greedy) for nats, greedy in zip(scored.nats.tolist(), scored.greedy.tolist())]
        return self._kept("loglikelihood", requests, answers)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood (nats) of each text; every token is predicted once, the first after `begin_id`."""
        windows, owners = [], []
        for place, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0]).tolist()
            for pair in utils.get_rolling_token_windows(ids, self.tokenizer.begin_id, self.max_len, context_len=1):
                context, predicted = utils.make_disjoint_window(pair)
                windows.append(Window(np.array([*context, *predicted], np.int32), len(context)))
                owners.append(place)
        scored = self.scorer.score_windows(windows, [f"request {place}" for place in owners], self.track)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, -scored.nats)
        return self._kept("loglikelihood_rolling", requests, sums.tolist())

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy text after each context, up to the first of its stop strings, which is left out."""
        prompts = [self._prompt(place, *request.args) for place, request in enumerate(requests)]
        texts = [""] * len(prompts)
        order = sorted(prompts, key=lambda p: (p.num_tokens, len(p.ids)), reverse=True)
        batches: list[list[_Prompt]] = []
        for _, group in itertools.groupby(order, lambda p: p.num_tokens):
            alike = list(group)
            batches += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
        for batch in self.track(batches):
            for prompt, text in zip(batch, self._generate(batch)):
                texts[prompt.place] = text
        return self._kept("generate_until", requests, texts)

    def _prompt(self, place: int, context: str, options: dict[str, Any]) -> _Prompt:
        for name in options:
            one_of(f"request {place}: generation option", name, GENERATION)
        if options.get("do_sample") or options.get("temperature"):
            raise ValueError(f"request {place} asks for sampling; decoding is greedy only, do_sample=False")
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else until
        num_tokens = options.get("max_gen_toks", MAX_GEN_TOKS)
        at_least(f"request {place}: max_gen_toks", num_tokens, 1)
        ids = np.concatenate([[self.tokenizer.begin_id], self.tokenizer.encode(context)]).astype(np.int32)
        if len(ids) + num_tokens > self.max_len:
            raise ValueError(
                f"request {place} has {len(ids)} tokens, which with max_gen_toks={num_tokens} are more than "
                f"max_len={self.max_len}"
            )
        return _Prompt(place, ids, tuple(stop for stop in until if stop), num_tokens)

    def _generate(self, prompts: Sequence[_Prompt]) -> list[str]:
        """Texts after prompts of equal `num_tokens`."""
        num_tokens = prompts[0].num_tokens
        # Always as many rows, and slots by the step: few programs.
        rows = [prompts[min(b, len(prompts) - 1)].ids for b in range(self.batch_size)]
        step = math.lcm(ROUND_SLOTS, slot_multiple(self.codec))
        slots = -(-(padded(max(map(len, rows))) + num_tokens) // step) * step
        session = Session(self.graphdef, self.params, self.batch_size, slots, self.codec)
        session.feed(rows, then=num_tokens)
        made: list[list[int]] = [[] for _ in prompts]
        for part in session.stream(num_tokens, stop=self.stop_ids, every=EVERY):
            for ids, new in zip(made, part.tokens):
                ids += new.tolist()
            texts = [self._text(prompt, ids) for prompt, ids in zip(prompts, made)]
            if all(ended for _, ended in texts):
                break
        return [text for text, _ in texts]

    def _text(self, prompt: _Prompt, ids: list[int]) -> tuple[str, bool]:
        """The text so far, and whether it is all."""
        ended = bool(ids) and ids[-1] in self.stop_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        places = [place for stop in prompt.until if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, ended)

    def _kept(self, kind: str, requests: list[Instance], answers: list) -> list:
        """The answers, which lm_eval may also keep on disk."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers
