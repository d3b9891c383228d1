"""A training run in its directory: resumes by itself, bit for bit, and ends in one result row."""

import contextlib
import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from kvjax import accounting, results, sharding
from kvjax.checkpoint import Checkpoints, digest
from kvjax.codecs.base import Exact
from kvjax.config import Config, to_dict
from kvjax.data import TrainBatches, load_corpus, load_tokenizer
from kvjax.decoder import decodable
from kvjax.evaluate import Score, evaluate, make_scorer
from kvjax.generate import generate
from kvjax.metrics import MetricsWriter
from kvjax.progress import Bar
from kvjax.runs import CHECKPOINTS, CONFIG, CONVERSION, TOKENIZER, check_same_config, check_same_origin
from kvjax.sampling import Sampling
from kvjax.slots import nbytes
from kvjax.train import cast, compute_dtype, graphdef_of, init_state, make_step

SAMPLE_TEMPERATURE = 0.8
SAMPLE_PROMPT = 16  # first tokens of the validation split, end of text included


class NotFinite(Exception):
    """Loss or gradient became nan or infinite; no update was made from it."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def run(config: Config, directory: Path) -> dict[str, Any]:
    """Train `config` in `directory`, from its newest sound checkpoint if there is one; the result row.

    ValueError for a directory of another configuration or one that another process is writing,
    before anything is written; NotFinite and Interrupted as they say.
    """
    mesh = sharding.make_mesh(config.train.batch_size // config.train.accumulate, "train.batch_size / accumulate")
    sharding.make_mesh(config.train.eval_batch_size, "train.eval_batch_size")
    finished = check_same_config(directory, config)
    if finished is not None:
        print(f"{directory} is finished; choose another --name to train again", flush=True)
        return finished
    trainer = Trainer(config, directory, mesh)
    fresh = not directory.exists()
    with results.RunLock(directory):
        try:
            return trainer.run()
        except ValueError:
            if fresh and not (directory / CHECKPOINTS).exists():  # nothing was trained yet
                shutil.rmtree(directory)
            raise


class Trainer:
    """One process's part of a run: data, step, and what is reported and saved on the way."""

    def __init__(self, config: Config, directory: Path, mesh: jax.sharding.Mesh):
        self.config, self.directory, self.mesh = config, directory, mesh
        self.tokenizer = load_tokenizer(config.data)
        train = load_corpus(config.data, self.tokenizer, "train")
        self.batches = TrainBatches(train, config.data.context, config.train.batch_size, config.seed)
        self.validation = load_corpus(config.data, self.tokenizer, "validation")
        self.vocab_size = self.tokenizer.vocab_size
        self.dtype = compute_dtype(config.train.dtype)
        self.graphdef = graphdef_of(config, self.vocab_size)
        self.scorer = make_scorer(self.graphdef, mesh)
        self.training_flops = accounting.flops_per_token(config, self.vocab_size, config.data.context, True)
        self.tokens_per_step = config.train.batch_size * config.data.context
        self.seconds, self.timed_tokens = 0.0, 0  # of steps, compilation and evaluation apart

    def run(self) -> dict[str, Any]:
        """From the newest sound checkpoint, or the start, to the result row."""
        config = self.config
        began = time.monotonic()
        with Checkpoints(self.directory / CHECKPOINTS) as checkpoints:
            metadata = checkpoints.metadata()
            if metadata is not None:
                check_same_origin(self.directory, metadata, config, self.tokenizer)
            results.write_json(self.directory / CONFIG, to_dict(config))
            results.write_bytes(self.directory / TOKENIZER, self.tokenizer.to_json().encode())
            self._describe()
            self.peak = accounting.matmul_peak(self.dtype)
            state, first, before = self._restore(checkpoints)
            wall = lambda: before + time.monotonic() - began
            with MetricsWriter(self.directory) as metrics, _signals() as caught:
                metrics.truncate_after(first)
                with Bar("step", config.train.steps, first) as bar:
                    state, score = self._steps(state, first, checkpoints, metrics, bar, caught, wall)
            row = self._row(state, score, wall())
            results.write_result(self.directory, row)
        return row

    def _restore(self, checkpoints: Checkpoints):
        """State, steps already taken, and the seconds they took."""
        like = jax.eval_shape(lambda: init_state(self.config, self.vocab_size))
        restored = checkpoints.restore(like)
        for line in checkpoints.damaged:
            print(f"damaged checkpoint passed over: {line}", flush=True)
        if restored is None and (self.directory / CONVERSION).exists():
            raise ValueError(f"{self.directory} holds converted weights, and no sound checkpoint of them is left")
        if restored is None:
            state, first, before = init_state(self.config, self.vocab_size), 0, 0.0
        else:
            first, state, metadata = restored
            before = metadata["wall_seconds"]
            print(f"resumed at step {first}", flush=True)
        return sharding.replicate(state, self.mesh), first, before

    def _steps(self, state, first, checkpoints, metrics, bar, caught, wall):
        """All steps; the metrics of one are read while the next runs."""
        train = self.config.train
        step = self._make_step()
        pending = score = None
        clock = None
        for i in range(first, train.steps):
            state, measured = step(state, sharding.split(self.batches[i], self.mesh))
            if pending is not None:
                self._report(*pending, metrics, bar)
            pending = (i + 1, measured)
            now = time.monotonic()
            if clock is not None:
                self.seconds += now - clock
                self.timed_tokens += self.tokens_per_step
            clock = now
            last = i + 1 == train.steps
            evaluates = last or (i + 1) % train.eval_every == 0
            if evaluates or caught or (i + 1) % train.checkpoint_every == 0:
                self._report(*pending, metrics, bar)
                pending = clock = None
                if evaluates:
                    score = self._evaluate(state.params, i + 1, bar)
                    self._record(score, i + 1, metrics)
                metadata = {"config": to_dict(self.config), "tokenizer": self.tokenizer.digest}
                checkpoints.save(i + 1, state, metadata | {"wall_seconds": wall()})
                if caught and not last:
                    checkpoints.close()
                    name = signal.Signals(caught[0]).name
                    raise Interrupted(
                        f"{name}: saved step {i + 1}; the same command goes on from there", caught[0]
                    )
        if score is None:  # stopped between the last checkpoint, after which all is recorded, and the result
            score = self._evaluate(state.params, train.steps, bar)
        return state, score

    def _make_step(self):
        return make_step(self.config, self.vocab_size, self.mesh)

    def _report(self, step, measured, metrics, bar):
        values = {name: float(value) for name, value in measured.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            metrics.write(step, values)
            raise NotFinite(
                f"step {step}: loss={values['loss']}, grad_norm={values['grad_norm']} on batch {step - 1} of "
                f"seed {self.config.seed}; no update was made, the last checkpoint is kept"
            )
        text = f"loss {values['loss']:.3f}"
        if self.seconds:
            rate = self.timed_tokens / self.seconds
            share = rate * self.training_flops / self.peak
            text += f"  {rate:,.0f} tokens/s  {share:.0%} of matmul peak"
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            metrics.write(step, values)
        bar.update(step, text)

    def _evaluate(self, params, step, bar) -> Score:
        train, context = self.config.train, self.config.data.context
        params = jax.jit(cast, static_argnums=1)(params, self.dtype)
        score = evaluate(self.scorer, params, self.validation, context, train.eval_batch_size, self.mesh)
        self.sample = self._sample(params)
        bar.line(
            f"step {step}: validation perplexity {score.perplexity:.2f}, {score.bits_per_byte:.4f} bits/byte "
            f"(standard error {score.bits_per_byte_se:.4f})\n  sample: {self.sample!r}"
        )
        return score

    def _record(self, score: Score, step, metrics):
        row = {k: v for k, v in score.row().items() if isinstance(v, float)}
        metrics.write(step, row, kind="validation")
        path, head = self.directory / "samples.txt", f"step {step}: "
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        # A run that goes on from before this step has written it already.
        lines = [line for line in lines if not line.startswith(head)] + [f"{head}{self.sample!r}"]
        results.write_bytes(path, "".join(f"{line}\n" for line in lines).encode())

    def _sample(self, params) -> str:
        prompt_T = self.validation.ids[:SAMPLE_PROMPT]
        graphdef, params = decodable(self.graphdef, params)
        count = self.config.train.sample_tokens
        made = generate(graphdef, params, [prompt_T], count, Sampling(SAMPLE_TEMPERATURE), self.config.seed)
        return self.tokenizer.decode([*prompt_T[1:], *made.tokens[0]])

    def _describe(self):
        for line in describe(self.config, self.vocab_size, self.dtype):
            print(line, flush=True)

    def _row(self, state, score: Score, wall_seconds: float) -> dict[str, Any]:
        config = self.config
        graphdef, params = decodable(self.graphdef, cast(state.params, self.dtype))
        cache = nnx.merge(graphdef, params).init_cache(1, config.data.context, Exact())
        rate = self.timed_tokens / self.seconds if self.seconds else None
        return {
            **score.row(),
            "cache_bytes_per_token": cache.bytes_per_token(),
            "cache_bytes": nbytes(cache.memory),
            "cache_slots": config.data.context,
            "parameters": accounting.num_parameters(state.params),
            "training_tokens": config.train.steps * self.tokens_per_step,
            "training_flops_per_token": self.training_flops,
            "tokens_per_second": rate,
            "share_of_matmul_peak": rate and rate * self.training_flops / self.peak,
            "matmul_peak_flops": self.peak,
            "wall_seconds": wall_seconds,
            "dtype": self.dtype.name,
            "digest": digest(state),
            "sample": self.sample,
            "config": to_dict(config),
            "environment": results.environment(),
        }


def describe(config: Config, vocab_size: int, dtype) -> list[str]:
    """What a run is, in a few lines."""
    parameters = accounting.num_parameters(accounting.abstract_params(config, vocab_size))
    cache = accounting.abstract_cache(config, vocab_size, 1, config.data.context, dtype)
    fields, train, data = dataclasses.asdict(config.attention), config.train, config.data
    flops = accounting.flops_per_token(config, vocab_size, config.data.context, training=True)
    return [
        f"{type(config.attention).__name__}({', '.join(f'{k}={v}' for k, v in fields.items())})",
        f"{parameters:,} parameters, {flops / 1e6:.1f} MFLOPs per training token, "
        f"{cache.bytes_per_token():,.0f} cache bytes per token in {dtype.name}",
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), "
        f"{train.steps} steps x {train.batch_size} x {data.context} tokens of {data.name}",
    ]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM end up in the list, to be acted on between steps."""
    caught: list[int] = []
    note: Callable = lambda signum, frame: caught.append(signum)
    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
