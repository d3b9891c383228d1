"""Text from a model: `python -m experiments.generate --run runs/gqa4 --prompt "The state of the Union"`.

`--model smollm2` takes a pretrained model, by name or directory; `--chat` puts the prompt to it as a question.
Tokens are shown as they are made; at the end stand tokens/s and what the cache holds. `--prompt -`
reads standard input. `--interactive` asks for more after each answer and keeps the cache.
`--no-cache` computes every token from the whole text, for comparison.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import host, results

EVERY = 8  # tokens between two updates of the screen
Turn = Callable[[str, int | None], list[int]]  # ids to feed for a text, after the answer's last token


def run(argv: Sequence[str]) -> int:
    """Generate, and print what it cost."""
    options = arguments(argv)
    host.prepare()
    from kvjax.codecs.base import slot_multiple
    from kvjax.generate import Session, padded, without_cache
    from kvjax.sampling import Sampling
    from kvjax.slots import nbytes

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    model = cli.open_model(options)
    tokenizer = model.tokenizer
    sampling.check(tokenizer.vocab_size)
    stop = list(model.stop_ids) if options.stop_at_end or options.chat else []
    turn = _chat(tokenizer, _system(options)) if options.chat else _text(tokenizer)
    line = _ask() if options.interactive and not options.prompt else _prompt(options.prompt)
    if line is None:
        return 0
    ids = turn(line, None)
    said = len(ids)
    _check_length(said + options.tokens, model.max_len)
    row: dict[str, Any] = {
        "model": model.name,
        "cached": options.cache,
        "codec": options.codec,
        "seed": options.seed,
    }
    if not options.cache:
        tokens = without_cache(model.graphdef, model.params, ids, options.tokens, sampling, options.seed, stop)
        _, text, figures = _watch(tokenizer, ([token] for token in tokens), stop)
        row |= {"prompt_tokens": len(ids)} | figures
        _close(row, text, options.json)
        return 0
    model, codec = cli.open_codec(options, model)
    max_len = options.max_len or padded(len(ids)) + options.tokens
    session = Session(model.graphdef, model.params, 1, max_len + -max_len % slot_multiple(codec), codec)
    while True:
        started = time.perf_counter()
        session.feed([ids], then=options.tokens)
        row |= {"prompt_tokens": len(ids), "prompt_seconds": time.perf_counter() - started}
        parts = session.stream(options.tokens, sampling, options.seed, stop, every=EVERY)
        made, text, figures = _watch(tokenizer, (part.tokens[0].tolist() for part in parts), stop)
        row |= figures
        used = int(session.cache.length)
        row |= {
            "cache_slots": session.cache.max_len,
            "cache_slots_used": used if session.cache.ring is None else min(used, session.cache.max_len),
            "cache_bytes": nbytes(session.cache.memory),
            "cache_bytes_per_token": session.cache.bytes_per_token(),
        }
        _close(row, text, options.json)
        if not options.interactive:
            return 0
        line = _ask()
        if line is None:
            return 0
        ids = turn(line, made[-1])
        said += len(made) + len(ids)
        _check_length(said + options.tokens, model.max_len)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.generate", __doc__)
    cli.add_model(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="beginning of the text; - reads stdin")
    parser.add_argument("--tokens", type=int, default=128, help="tokens at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="draw from tokens of this share of the top")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--max-len", type=int, help="slots of the cache (default: prompt and tokens)")
    parser.add_argument("--interactive", action="store_true", help="ask for more text after each answer")
    parser.add_argument("--chat", action="store_true", help="prompts are turns of a conversation (ChatML models)")
    parser.add_argument("--system", metavar="TEXT", help="first turn of a chat (default: smollm2's own, or none)")
    parser.add_argument("--stop-at-end", action="store_true", help="stop where the model ends its document")
    parser.add_argument(
        "--no-cache", dest="cache", action="store_false", help="read the whole text for every token"
    )
    cli.add_codec(parser)
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the result here")
    options = parser.parse_args(argv)
    cli.require_positive(options, "tokens", "max_len")
    if not 0 <= options.seed < 2**31:
        raise ValueError(f"--seed={options.seed} must be at least 0 and below {2**31}")
    if options.system is not None and not options.chat:
        raise ValueError("--system is the beginning of a --chat")
    if options.codec is not None and not options.cache:
        raise ValueError("--codec stores a cache; leave out --no-cache")
    if options.interactive and not options.cache:
        raise ValueError("--interactive keeps a cache; leave out --no-cache")
    if options.interactive and options.max_len is None:
        options.max_len = 4096
    return options


def _check_length(tokens: int, most: int | None) -> None:
    if most is not None and tokens > most:
        raise ValueError(f"{tokens} tokens, prompt and --tokens, must be at most the model's max_len={most}")


def _text(tokenizer) -> Turn:
    """A text begins with its mark; what follows an answer is text alone."""
    begin = [tokenizer.begin_id]

    def turn(text, last):
        ids = tokenizer.encode(text).tolist()
        return [*begin, *ids] if last is None else ids or begin

    return turn


def _system(options: argparse.Namespace) -> str:
    from kvjax.pretrained.smollm2 import SYSTEM

    return options.system if options.system is not None else SYSTEM if options.model == "smollm2" else ""


def _chat(tokenizer, system: str) -> Turn:
    """Turns in ChatML, as models trained with `<|im_start|>` expect them; text cannot make a mark."""
    mark = getattr(tokenizer, "token_id", lambda token: None)
    start, end = mark("<|im_start|>"), mark("<|im_end|>")
    if start is None or end is None:
        raise ValueError("--chat needs a tokenizer with <|im_start|> and <|im_end|>; leave it out")
    ids = lambda text: tokenizer.encode(text).tolist()

    opening = [start, *ids(f"system\n{system}"), end, *ids("\n")] if system else []

    def turn(text, last):
        # An answer that was cut short has not ended its turn.
        before = [] if last == end else [end]
        before = opening if last is None else [*before, *ids("\n")]
        return [*before, start, *ids(f"user\n{text}"), end, *ids("\n"), start, *ids("assistant\n")]

    return turn


def _prompt(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input must be UTF-8: byte {error.start} is not") from None


def _watch(tokenizer, parts: Iterable[list[int]], hidden: Sequence[int]) -> tuple[list[int], str, dict[str, Any]]:
    """Print tokens as they come, but for hidden ones; all of them, the text shown, and their speed."""
    made, text, shown, rates = [], "", "", []
    started = before = time.perf_counter()
    for part in parts:
        made += part
        text = tokenizer.decode([token for token in made if token not in hidden])
        whole = text.rstrip("\ufffd")  # a character whose bytes are not all there waits
        print(whole[len(shown) :], end="", flush=True)
        now, shown = time.perf_counter(), whole
        rates.append(len(part) / (now - before))
        before = now
    # The first part compiles; the median does not see it.
    figures = {"tokens": len(made), "seconds": before - started, "tokens_per_second": statistics.median(rates)}
    return made, text, figures


def _close(row: dict[str, Any], text: str, file: Path | None) -> None:
    line = (
        f"{row['tokens']} tokens, {row['tokens_per_second']:,.1f} tokens/s "
        f"({row['seconds']:.2f} s in all, with compilation)"
    )
    if row["cached"]:
        line += (
            f"; cache {row['cache_bytes'] / 2**10:,.0f} KiB, {row['cache_slots_used']} of {row['cache_slots']} "
            f"slots used, {row['cache_bytes_per_token']:,.0f} bytes per token"
        )
    print(f"\n[{line}]", flush=True)
    if file is not None:
        results.write_json(file, row | {"text": text, "environment": results.environment()})


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


if __name__ == "__main__":
    cli.main(run)
