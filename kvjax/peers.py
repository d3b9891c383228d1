"""The same model trained, and decoding, by PyTorch and Hugging Face transformers, in a process of its own.

In one process the thread pools of two frameworks disturb each other; here one waits while the other
computes. Needs the extra `peers`.
"""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from kvjax import host
from kvjax.attention.grouped import Grouped
from kvjax.benchmark import peak_resident_bytes, random_batches
from kvjax.checks import multiple
from kvjax.config import Config, from_dict, to_dict
from kvjax.decoder import Decoder
from kvjax.dry_run import vocabulary
from kvjax.pretrained.families import Architecture, hugging_face
from kvjax.pretrained.weights import named_weights
from kvjax.train import compute_dtype


def check(config: Config) -> None:
    """ValueError where transformers' Llama cannot be the same model, or is not installed."""
    if not isinstance(config.attention, Grouped):
        kind = type(config.attention).__name__
        raise ValueError(f"--against torch compares Grouped attention (mha, gqa, mqa) alone, not {kind}")
    same = {
        "attention.qk_norm": (config.attention.qk_norm, False),
        "attention.qkv_bias": (config.attention.qkv_bias, False),
        "attention.window": (config.attention.window, None),
        "attention.rope_scaling": (config.attention.rope_scaling, None),
        "attention.output_bias": (config.attention.output_bias, False),
        "decoder.dropout": (config.decoder.dropout, 0.0),
        "decoder.remat": (config.decoder.remat, False),
        "train.accumulate": (config.train.accumulate, 1),
        "train.dtype": (compute_dtype(config.train.dtype).name, "float32"),
        "the backend": (jax.default_backend(), "cpu"),
    }
    for field, (value, rule) in same.items():
        if value != rule:
            raise ValueError(f"{field}={value} must be {rule} for --against torch")
    multiple("decoder.width", config.decoder.width, "attention.num_heads", config.attention.num_heads)
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--against torch needs {package}: pip install -e '.[peers]'")


def llama(config: Config, vocab_size: int, max_len: int | None = None) -> Any:
    """A `LlamaForCausalLM` of the architecture of `config`, its weights drawn by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = Architecture(config.decoder, config.attention, vocab_size, max_len or config.data.context, None, ())
    return LlamaForCausalLM(LlamaConfig.from_dict(hugging_face(ours), attn_implementation="sdpa"))


def copy_weights(model: Any, decoder: Decoder) -> None:
    """Give a `llama` the weights of an unscanned decoder."""
    import torch

    parameters, weights = dict(model.named_parameters()), named_weights(decoder)
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = torch.from_numpy(np.array(weights[name]))
            assert parameter.shape == value.shape, name
            parameter.copy_(value)


def loss(model: Any, tokens_BT: Any, targets_BT: Any) -> Any:
    """Mean cross-entropy (nats) of a `llama`."""
    import torch

    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class TorchWorkload:
    """Eager training: fused attention, fused AdamW, gradient clipping, PyTorch's own number of threads."""

    def __init__(self, config: Config):
        import torch

        self.config, vocab_size = config, vocabulary(config.data)
        self.batches = random_batches(config, vocab_size)
        self.model = llama(config, vocab_size)
        decays = lambda p: p.ndim > 1
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if decays(p)], "weight_decay": config.optimizer.weight_decay},
            {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.optimizer.peak_lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            fused=True,
        )

    def seconds(self, steps: int) -> float:
        """Time of `steps` steps, batches from NumPy included."""
        import torch

        started = time.perf_counter()
        for i in range(steps):
            batch = {name: torch.from_numpy(a).long() for name, a in self.batches[i % len(self.batches)].items()}
            self.optimizer.zero_grad(set_to_none=True)
            loss(self.model, **batch).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
            self.optimizer.step()
        return time.perf_counter() - started


class TorchDecodeWorkload:
    """`generate` of transformers, greedy, from a cache that its prefill fills; prefill is not timed."""

    def __init__(self, config: Config, batch: int, filled: int, tokens: int, implementation: str):
        import torch

        self.model = llama(config, vocabulary(config.data), filled + tokens + 1).eval()
        prompts = np.random.default_rng(0).integers(0, vocabulary(config.data), (batch, filled))
        self.ids_BT, self.tokens = torch.from_numpy(prompts), tokens
        self.options = {"cache_implementation": "static"} if implementation == "static" else {}

    def seconds(self, rounds: int) -> float:
        """Time of one token for every row, the mean of `rounds` generations."""
        import torch
        from transformers import StoppingCriteria

        times: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids, scores, **options):
                times.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        total = 0.0
        for _ in range(rounds):
            times.clear()
            self.model.generate(
                self.ids_BT,
                attention_mask=torch.ones_like(self.ids_BT),
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
                max_new_tokens=self.tokens + 1,
                stopping_criteria=[Clock()],
                **self.options,
            )
            assert len(times) == self.tokens + 1
            total += (times[-1] - times[0]) / self.tokens
        return total / rounds


class Worker:
    """A PyTorch workload in a process of its own that computes only while it is asked to; a context manager.

    Training, or with `decoding` the arguments of a `TorchDecodeWorkload`.
    """

    def __init__(self, config: Config, **decoding: int | str):
        check(config)
        command = [sys.executable, "-m", "kvjax.peers"]
        root = Path(__file__).parents[1]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        self.description = self._ask(json.dumps({"config": to_dict(config), "decoding": decoding}))
        """Versions, threads and parameters."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._questions.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def seconds(self, steps: int) -> float:
        """Time of `steps` steps."""
        answer = self._ask(f"go {steps}")
        self.peak_resident_bytes = answer["peak_resident_bytes"]
        return answer["seconds"]

    def _ask(self, line: str) -> dict[str, Any]:
        print(line, file=self._questions, flush=True)
        answer = self._answers.readline()
        if not answer:
            raise RuntimeError(f"the torch worker ended with status {self._process.wait()}")
        return json.loads(answer)


def serve(lines: Iterable[str]) -> None:
    """Answer the lines of a `Worker` with lines of JSON: first what to do, then `go STEPS`."""
    import torch
    import transformers

    lines = iter(lines)
    order = json.loads(next(lines))
    config, decoding = from_dict(order["config"]), order["decoding"]
    workload = TorchDecodeWorkload(config, **decoding) if decoding else TorchWorkload(config)
    description = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in workload.model.parameters()),
    }
    print(json.dumps(description), flush=True)
    for line in lines:
        command, steps = line.split()
        assert command == "go"
        seconds = workload.seconds(int(steps))
        print(json.dumps({"seconds": seconds, "peak_resident_bytes": peak_resident_bytes()}), flush=True)


if __name__ == "__main__":
    host.prepare()  # the allocator's settings, worth as much to PyTorch as to JAX
    serve(sys.stdin)
