"""A model to use, wherever it comes from: a run's directory, or a pretrained one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from kvjax.config import Config
from kvjax.data import Tokenizer
from kvjax.decoder import Decoder, decodable
from kvjax.runs import load_run
from kvjax.train import cast, compute_dtype, graphdef_of


@dataclass(frozen=True)
class Model:
    """What evaluation and generation need."""

    name: str
    """Where it was opened from."""
    graphdef: nnx.GraphDef[Decoder]
    params: Any
    """In the compute dtype, in the structure of `nnx.split(decoder)`."""
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    """Tokens that end a text."""
    max_len: int | None
    """Positions that it was made for, None where nothing bounds them."""
    config: Config | None = None
    """The run's configuration; None for a pretrained model."""
    step: int | None = None
    """The run's step."""
    damaged: tuple[str, ...] = ()
    """Damaged checkpoints that were passed over, a line each."""


def open_model(run: Path | None, model: str | None, dtype: str | None = None) -> Model:
    """The newest checkpoint of a run, or a pretrained model by name or directory; ValueError for none or both.

    Parameters are in `dtype`; None is that of the run's configuration, or "auto".
    """
    if (run is None) == (model is None):
        raise ValueError("give either --run DIR or --model NAME_OR_DIR")
    if run is None:
        from kvjax import pretrained

        assert model is not None
        return pretrained.load(model, dtype or "auto")
    trained = load_run(run)
    tokenizer, config = trained.tokenizer, trained.config
    params = cast(trained.params, compute_dtype(dtype or config.train.dtype))
    graphdef, params = decodable(graphdef_of(config, tokenizer.vocab_size), params)
    return Model(
        str(run), graphdef, params, tokenizer, (tokenizer.end_id,), None, config, trained.step, trained.damaged
    )
