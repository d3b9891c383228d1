"""Text from a trained run: `python -m experiments.generate --run runs/gqa4 --prompt "The state of the Union"`.

Tokens are shown as they are made; at the end stand tokens/s and what the cache holds. `--prompt -`
reads standard input. `--interactive` asks for more after each answer and keeps the cache.
`--no-cache` computes every token from the whole text, for comparison.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from kvjax import host, results

EVERY = 8  # tokens between two updates of the screen


def run(argv: Sequence[str]) -> int:
    """Generate, and print what it cost."""
    options = arguments(argv)
    host.prepare()
    from kvjax.cache import nbytes
    from kvjax.decoder import decodable
    from kvjax.generate import Session, padded, without_cache
    from kvjax.runs import load_run
    from kvjax.sampling import Sampling
    from kvjax.train import cast, compute_dtype, graphdef_of

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    trained = load_run(options.run)
    for line in trained.damaged:
        print(f"damaged checkpoint passed over: {line}")
    tokenizer = trained.tokenizer
    sampling.check(tokenizer.vocab_size)
    dtype = compute_dtype(trained.config.train.dtype)
    graphdef = graphdef_of(trained.config, tokenizer.vocab_size)
    graphdef, params = decodable(graphdef, cast(trained.params, dtype))
    stop = [tokenizer.end_id] if options.stop_at_end else []
    ids = [tokenizer.end_id, *tokenizer.encode(_prompt(options.prompt))]
    row: dict[str, Any] = {"run": str(options.run), "cached": options.cache, "seed": options.seed}
    if not options.cache:
        tokens = without_cache(graphdef, params, ids, options.tokens, sampling, options.seed, stop)
        made, figures = _watch(tokenizer, ([token] for token in tokens))
        row |= {"prompt_tokens": len(ids)} | figures
        _close(row, tokenizer.decode(made), options.json)
        return 0
    max_len = options.max_len or padded(len(ids)) + options.tokens
    session = Session(graphdef, params, 1, max_len)
    while True:
        started = time.perf_counter()
        session.feed([ids], then=options.tokens)
        row |= {"prompt_tokens": len(ids), "prompt_seconds": time.perf_counter() - started}
        parts = session.stream(options.tokens, sampling, options.seed, stop, every=EVERY)
        made, figures = _watch(tokenizer, (part.tokens[0].tolist() for part in parts))
        row |= figures
        used = int(session.cache.length)
        row |= {
            "cache_slots": session.cache.max_len,
            "cache_slots_used": used if session.cache.ring is None else min(used, session.cache.max_len),
            "cache_bytes": nbytes(session.cache.memory),
            "cache_bytes_per_token": session.cache.bytes_per_token(),
        }
        _close(row, tokenizer.decode(made), options.json)
        if not options.interactive:
            return 0
        line = _ask()
        if line is None:
            return 0
        ids = tokenizer.encode(line).tolist() or [tokenizer.end_id]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.generate", __doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", required=True, help="directory of a run")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="beginning of the text; - reads stdin")
    parser.add_argument("--tokens", type=int, default=128, help="tokens at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="draw from tokens of this share of the top")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--max-len", type=int, help="slots of the cache (default: prompt and tokens)")
    parser.add_argument("--interactive", action="store_true", help="ask for more text after each answer")
    parser.add_argument("--stop-at-end", action="store_true", help="stop where the model ends its document")
    parser.add_argument(
        "--no-cache", dest="cache", action="store_false", help="read the whole text for every token"
    )
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the result here")
    options = parser.parse_args(argv)
    for name in ("tokens", "max_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")
    if not 0 <= options.seed < 2**31:
        raise ValueError(f"--seed={options.seed} must be at least 0 and below {2**31}")
    if options.interactive and not options.cache:
        raise ValueError("--interactive keeps a cache; leave out --no-cache")
    if options.interactive and options.max_len is None:
        options.max_len = 4096
    return options


def _prompt(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input must be UTF-8: byte {error.start} is not") from None


def _watch(tokenizer, parts: Iterable[list[int]]) -> tuple[list[int], dict[str, Any]]:
    """Print tokens as they come; all of them, and their speed."""
    made, shown, rates = [], "", []
    started = before = time.perf_counter()
    for part in parts:
        made += part
        text = tokenizer.decode(made).rstrip("\ufffd")  # a character whose bytes are not all there waits
        print(text[len(shown) :], end="", flush=True)
        now, shown = time.perf_counter(), text
        rates.append(len(part) / (now - before))
        before = now
    # The first part compiles; the median does not see it.
    figures = {"tokens": len(made), "seconds": before - started, "tokens_per_second": statistics.median(rates)}
    return made, figures


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
