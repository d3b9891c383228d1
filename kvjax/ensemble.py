"""Runs that differ in seed and peak learning rate alone, trained as one program.

Each member has its own weights, batches, schedule, clipping and dropout, as in a run of its own, and
the same numbers up to the order in which sums are taken. Where this pays is measured by
`experiments.benchmark_ensemble`: where a step of one member does not fill the machine.
B batch, M members, T tokens.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kvjax import accounting, results, sharding
from kvjax.checkpoint import Checkpoints
from kvjax.checks import at_least
from kvjax.config import Config, to_dict
from kvjax.data import TrainBatches
from kvjax.evaluate import Score
from kvjax.loop import NotFinite, Trainer, _signals
from kvjax.metrics import MetricsWriter
from kvjax.progress import Bar
from kvjax.runs import CHECKPOINTS, CONFIG, TOKENIZER, check_same_config, check_same_origin, differences
from kvjax.train import Batch, TrainState, dropout_key, init_state, make_update, schedule

OWN = ("seed", "optimizer.peak_lr")


@dataclass(frozen=True)
class Members:
    """Member m is `config` with the seed `seeds[m]` and the peak learning rate `peak_lrs[m]`: lists in step."""

    config: Config
    seeds: tuple[int, ...]
    peak_lrs: tuple[float, ...]

    def __post_init__(self):
        if not len(self.seeds) == len(self.peak_lrs) > 0:
            raise ValueError(
                f"seeds and peak_lrs must be as many, at least 1, not {len(self.seeds)} and {len(self.peak_lrs)}"
            )
        pairs = list(zip(self.seeds, self.peak_lrs))
        for seed, peak_lr in pairs:
            if pairs.count((seed, peak_lr)) > 1:
                raise ValueError(f"seed={seed} with optimizer.peak_lr={peak_lr} must be one member, not several")

    @classmethod
    def of(cls, configs: Sequence[Config]) -> Self:
        """Of whole configurations; ValueError naming a field, but these two, that is not the same in all."""
        at_least("number of configurations", len(configs), 1)
        for number, config in enumerate(configs):
            for path, (theirs, ours) in differences(to_dict(configs[0]), to_dict(config)):
                if path not in OWN:
                    raise ValueError(
                        f"{path}={ours} of member {number} must be {theirs}, as of member 0: members differ in "
                        f"{' and '.join(OWN)} only"
                    )
        return cls(configs[0], tuple(c.seed for c in configs), tuple(c.optimizer.peak_lr for c in configs))

    @property
    def configs(self) -> list[Config]:
        """The configuration of every member."""
        optimizer = self.config.optimizer
        return [
            replace(self.config, seed=seed, optimizer=replace(optimizer, peak_lr=peak_lr))
            for seed, peak_lr in zip(self.seeds, self.peak_lrs)
        ]


def stack(states: Sequence[Any]) -> Any:
    """Trees of members as one, whose arrays have a leading axis M."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@jax.jit
def member(states: Any, m: int) -> Any:
    """The tree of one member."""
    return jax.tree.map(lambda leaf_M: leaf_M[m], states)


def init_states(members: Members, vocab_size: int) -> TrainState:
    """Every member's initial weights, bit for bit those of its own run, and zero moments; a leading axis M."""
    of_seed = {seed: init_state(replace(members.config, seed=seed), vocab_size) for seed in members.seeds}
    return stack([of_seed[seed] for seed in members.seeds])


def make_step(members: Members, vocab_size: int, mesh: Mesh) -> jax.stages.Wrapped:
    """`train.make_step` for all members: states (donated) and batch `tokens_BMT, targets_BMT` to states, metrics.

    States and metrics have a leading axis M. A member whose loss or gradient is not finite keeps its
    parameters and moments; the others go on.
    """
    update = make_update(members.config, vocab_size, mesh)
    # Built for each from Python numbers, as alone: with traced peaks they would be rounded in other places.
    rates = [schedule(config.optimizer, config.train.steps) for config in members.configs]

    def step(states: TrainState, batch: Batch):
        keys = [key for config in members.configs if (key := dropout_key(config)) is not None]
        keys_M = jnp.stack(keys) if keys else None
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            lr_M = jnp.stack([rate(states.step[m]) for m, rate in enumerate(rates)])
        one = lambda state, batch, key, lr: update(state, batch, key, lambda _: lr)
        return jax.vmap(one, in_axes=(0, 1, 0, 0))(states, batch, keys_M, lr_M)

    return jax.jit(step, donate_argnums=0)


class Batches:
    """`batches[step]` of every member: `tokens_BMT, targets_BMT`, so that devices split the first axis."""

    def __init__(self, of_members: Sequence[Any]):
        self._of_members = of_members

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        rows = [batches[step] for batches in self._of_members]
        return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}


def run_together(configs: Sequence[Config], directories: Sequence[Path]) -> list[dict[str, Any] | NotFinite]:
    """Train runs as one program; the result row of each, or the NotFinite that ended it alone.

    Each directory gets what `loop.run` writes and can be gone on with by either. A row's `together` is the
    number of runs of the program; `wall_seconds` is a run's equal share of it, `tokens_per_second` its whole
    rate. Finished runs are left as they are; of others, those whose newest sound checkpoint is of one step go
    on together. A run that is not finite stops, its last checkpoint kept, and is tried again by a later call.
    ValueError and Interrupted as of `loop.run`, and ValueError for configurations that differ in more than
    seed and peak learning rate, before anything is written.
    """
    if len(configs) != len(directories) or len(set(directories)) != len(directories):
        raise ValueError(f"{len(configs)} configurations must have as many, different directories")
    config = Members.of(configs).config
    mesh = sharding.make_mesh(config.train.batch_size // config.train.accumulate, "train.batch_size / accumulate")
    sharding.make_mesh(config.train.eval_batch_size, "train.eval_batch_size")
    outcomes: dict[Path, Any] = {}
    for config, directory in zip(configs, directories):
        outcomes[directory] = check_same_config(directory, config)
        if outcomes[directory] is not None:
            print(f"{directory} is finished; choose another --name to train again", flush=True)
    left = [pair for pair in zip(configs, directories) if outcomes[pair[1]] is None]
    if left:
        outcomes |= _train(left, mesh)
    return [outcomes[directory] for directory in directories]


def _train(runs: list[tuple[Config, Path]], mesh: Mesh) -> dict[Path, Any]:
    shared = Trainer(*runs[0], mesh)
    shared.peak = accounting.matmul_peak(shared.dtype)
    with contextlib.ExitStack() as opened:
        for _, directory in runs:
            opened.enter_context(results.RunLock(directory))
        members = []
        for config, directory in runs:
            checkpoints = opened.enter_context(Checkpoints(directory / CHECKPOINTS))
            members.append(Member(shared, config, directory, checkpoints))
        shared._describe()
        for first in sorted({member.first for member in members}):
            Group(shared, [member for member in members if member.first == first]).train(first)
    return {member.directory: member.outcome for member in members}


class Member(Trainer):
    """A run of a group in its directory, restored; shares all that depends on neither seed nor rate."""

    def __init__(self, shared: Trainer, config: Config, directory: Path, checkpoints: Checkpoints):
        vars(self).update(vars(shared))
        self.config, self.directory, self.checkpoints = config, directory, checkpoints
        corpus, train = shared.batches.corpus, config.train
        self.batches = TrainBatches(corpus, config.data.context, train.batch_size, config.seed)
        self.outcome: dict[str, Any] | NotFinite | None = None
        metadata = checkpoints.metadata()
        if metadata is not None:
            check_same_origin(directory, metadata, config, self.tokenizer)
        results.write_json(directory / CONFIG, to_dict(config))
        results.write_bytes(directory / TOKENIZER, self.tokenizer.to_json().encode())
        self.state, self.first, self.before = self._restore(checkpoints)


class Voice:
    """A member's side of the group's bar."""

    def __init__(self, bar: Bar, name: str):
        self._bar, self._name = bar, name

    def update(self, done: int, text: str) -> None:
        """As of the bar, with the name of whose figures these are."""
        self._bar.update(done, f"{text}  ({self._name})")

    def line(self, text: str) -> None:
        """As of the bar."""
        self._bar.line(f"{self._name}, {text}")


class Group(Trainer):
    """The loop of `Trainer` over stacked states; it reports, evaluates and saves for every member."""

    def __init__(self, shared: Trainer, members: list[Member]):
        vars(self).update(vars(shared))
        self.members, self.number = members, len(members)
        self.batches: Any = Batches([member.batches for member in members])
        self.tokens_per_step = shared.tokens_per_step * self.number

    def train(self, first: int) -> None:
        """From step `first` to every member's outcome."""
        began = time.monotonic()
        share = lambda: (time.monotonic() - began) / self.number
        for one in self.members:
            rate, seed = one.config.optimizer.peak_lr, one.config.seed
            print(f"{one.directory}: one of {self.number} together, seed {seed}, peak_lr {rate}", flush=True)
        states = sharding.replicate(stack([member.state for member in self.members]), self.mesh)
        for one in self.members:
            one.state = None  # its copy is the stack's
        with contextlib.ExitStack() as opened:
            metrics = [opened.enter_context(MetricsWriter(one.directory)) for one in self.members]
            for writer in metrics:
                writer.truncate_after(first)
            caught = opened.enter_context(_signals())
            bar = opened.enter_context(Bar("step", self.config.train.steps, first))
            try:
                ended: Any = self._steps(states, first, self, metrics, bar, caught, share)
            except NotFinite:  # no member is left, and each has its own
                return
        (states, scores), seconds = ended, share()
        for m, one in self._going():
            row = one._row(member(states, m), scores[m], one.before + seconds)
            one.outcome = row | {"together": self.number}
            results.write_result(one.directory, one.outcome)

    def save(self, step: int, states: TrainState, metadata: dict[str, Any]) -> None:
        """As `Checkpoints.save`, for every member; `wall_seconds` are a member's share."""
        for m, one in self._going():
            own = {"config": to_dict(one.config), "wall_seconds": one.before + metadata["wall_seconds"]}
            one.checkpoints.save(step, member(states, m), metadata | own)

    def close(self) -> None:
        """As `Checkpoints.close`."""
        for one in self.members:
            one.checkpoints.close()

    def _going(self) -> list[tuple[int, Member]]:
        """Members that are finite so far, with their places in the stack."""
        return [(m, one) for m, one in enumerate(self.members) if one.outcome is None]

    def _make_step(self) -> Any:
        return make_step(Members.of([one.config for one in self.members]), self.vocab_size, self.mesh)

    def _report(self, step, measured, metrics, bar):
        measured = {name: np.asarray(value_M) for name, value_M in measured.items()}
        for m, one in self._going():
            one.seconds, one.timed_tokens = self.seconds, self.timed_tokens
            values = {name: value_M[m] for name, value_M in measured.items()}
            try:
                one._report(step, values, metrics[m], Voice(bar, one.directory.name))
            except NotFinite as error:
                one.outcome = error
                bar.line(f"{one.directory} stopped: {error}")
                if not self._going():
                    raise

    def _evaluate(self, params, step, bar) -> Any:
        scores: list[Score | None] = [None] * self.number
        for m, one in self._going():
            scores[m] = one._evaluate(member(params, m), step, Voice(bar, one.directory.name))
        return scores

    def _record(self, score: Any, step, metrics):
        for m, one in self._going():
            one._record(score[m], step, metrics[m])
