"""A trained run as a model that transformers loads: `python -m experiments.export --run runs/gqa4 --to DIR`.

Grouped attention becomes Llama, Mistral, Qwen2 or Qwen3, MLA becomes DeepSeek-V3, with the tokenizer and a
card of what was trained, on what, and how well it did.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from kvjax import host, results


def run(argv: Sequence[str]) -> int:
    """Export, and print where."""
    options = arguments(argv)
    host.prepare()
    from kvjax.config import to_dict
    from kvjax.pretrained import save
    from kvjax.runs import RESULT

    model = cli.open_model(options, "float32")
    assert model.config is not None
    result, steps = options.run / RESULT, model.config.train.steps
    facts = {
        "trained with": "kvjax",
        "data": f"{model.config.data.name}, {model.config.data.tokenizer} tokenizer",
        "steps": f"{model.step} of {steps}",
    }
    if result.is_file() and model.step == steps:  # the score is of the last step
        score, names = results.read_json(result), ("perplexity", "bits_per_byte", "bits_per_byte_se")
        facts |= {f"validation {name}": score[name] for name in names}
    facts["config"] = "`" + json.dumps(to_dict(model.config)) + "`"
    save(options.to, model, options.max_len or model.config.data.context, facts)
    print(options.to)
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options of this command, checked."""
    parser = cli.parser("experiments.export", __doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", required=True, help="directory of a run")
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="new directory to write")
    parser.add_argument("--max-len", type=int, help="positions it is made for (default: the run's context)")
    parser.set_defaults(model=None)
    options = parser.parse_args(argv)
    cli.require_positive(options, "max_len")
    return options


if __name__ == "__main__":
    cli.main(run)
