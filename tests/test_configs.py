import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import cli, convert
from kvjax import accounting
from kvjax.attention.latent import Latent
from kvjax.codecs.statistics import ArrayStatistics, Moments, Statistics
from kvjax.config import Config, to_dict
from kvjax.data.config import DataConfig
from kvjax.data.tokenizer import ByteTokenizer
from kvjax.dry_run import vocabulary
from kvjax.recipe_build import build
from kvjax.recipes import parse
from kvjax.results import write_json
from kvjax.study import Study, matched

# What the cache holds of a token and layer, counted by hand.
ELEMENTS = {
    "gqa2": 2 * 2 * 24,
    "gqa4": 2 * 4 * 24,
    "gqa4_124m": 2 * 4 * 64,
    "low_rank": 96,
    "mha": 2 * 8 * 24,
    "mla": 64 + 16,
    "mqa": 2 * 1 * 24,
    "tiny": 2 * 2 * 16,
}
# The same of a study's variants; those of equal bytes are each other's controls.
STUDIES = {
    "kv_cache": {
        "mha": 2 * 8 * 24,
        "gqa4": 2 * 4 * 24,
        **{"gqa2": 96, "low_rank96": 96},
        **{"mqa": 48, "mha_small_heads": 48, "low_rank48": 48, "mla32": 48},
        "mla64": 64 + 16,
    }
}


@pytest.fixture(params=cli.presets())
def named(request) -> tuple[str, Config]:
    return request.param, cli.preset(request.param)


def vocab_size(data: DataConfig) -> int:
    return ByteTokenizer().vocab_size if data.tokenizer == "bytes" else data.vocab_size


def test_every_preset_tells_its_story(named):
    name, config = named
    module = importlib.import_module(f"configs.{name}")
    assert isinstance(module.__doc__, str) and len(module.__doc__) >= 40
    assert isinstance(config, Config)
    assert [v for v in vars(module).values() if isinstance(v, Config)] == [config]


def test_every_preset_builds(named):
    _, config = named
    model = nnx.eval_shape(lambda: config.build(vocab_size(config.data)))
    assert len(model.layers) == config.decoder.depth
    params = nnx.split(model)[1]
    assert params["embedding_VD"].shape == (vocab_size(config.data), config.decoder.width)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_holds_what_is_declared(named, dtype):
    _, config = named
    dtype = jnp.dtype(dtype)
    cache = accounting.abstract_cache(config, vocab_size(config.data), 3, 11, dtype)
    assert cache.bytes_per_token() == accounting.declared_bytes_per_token(config, dtype.itemsize)


@pytest.mark.parametrize("name", ELEMENTS)
def test_declared_bytes_by_hand(name):
    config = cli.preset(name)
    assert accounting.declared_bytes_per_token(config, 2) == ELEMENTS[name] * config.decoder.depth * 2


def test_the_compared_presets_differ_in_attention_alone():
    compared = [cli.preset(name) for name in ("gqa2", "gqa4", "low_rank", "mha", "mla", "mqa")]
    assert len({config.attention for config in compared}) == len(compared)
    rest = {dataclasses.replace(config, attention=compared[0].attention) for config in compared}
    assert rest == {compared[0]}
    assert {config.attention.num_heads for config in compared} == {8}


def test_gpt2_small_sized_preset():
    config = cli.preset("gqa4_124m")
    assert (config.decoder.depth, config.decoder.width) == (12, 768)
    D, L, V = 768, 12, config.data.vocab_size
    attention = D * 64 * (12 + 4 + 4 + 12)
    total = V * D + L * (attention + 3 * D * config.decoder.mlp_width + 2 * D) + D
    measured = accounting.num_parameters(accounting.abstract_params(config, V))
    assert measured == total and 120e6 < total < 130e6


def test_presets_are_the_files(tmp_path):
    names = sorted(p.stem for p in (tmp_path / cli.__file__).parents[1].glob("configs/*.py"))
    assert cli.presets() == [name for name in names if re.fullmatch("[a-z0-9_]+", name) and name != "__init__"]


@pytest.fixture(scope="module", params=cli.studies())
def study(request) -> Study:
    return cli.study(request.param)


@pytest.fixture(scope="module")
def variants(study) -> dict[str, tuple[Config, float]]:
    """Its matched configurations, and by how much each misses the reference."""
    return matched(study)


def test_every_study_tells_its_story(study):
    (name,) = [name for name in cli.studies() if cli.study(name) is study]
    story = importlib.import_module(f"configs.studies.{name}").__doc__ or ""
    assert len(story) >= 100 and f"`python -m experiments.sweep --study {name}" in story


def test_matched_variants_differ_in_attention_and_the_free_field(study, variants):
    """Parameters counted from the shapes of the whole model, not by the matching."""
    reference = study.variants[study.reference]
    size = lambda config: accounting.num_parameters(accounting.abstract_params(config, vocabulary(config.data)))
    section, _, field = study.free.partition(".")
    for label, (config, residual) in variants.items():
        assert abs(residual) < 1e-3, label
        if study.matching == "params":
            assert residual == pytest.approx(size(config) / size(reference) - 1, abs=1e-12)
        free = dataclasses.replace(
            getattr(config, section), **{field: getattr(getattr(reference, section), field)}
        )
        assert dataclasses.replace(config, attention=reference.attention, **{section: free}) == reference


@pytest.mark.parametrize(("name", "elements"), STUDIES.items(), ids=STUDIES)
def test_bytes_of_a_studys_variants_by_hand(name, elements):
    """As declared, and in arrays."""
    found = {}
    for label, config in cli.study(name).variants.items():
        cache = accounting.abstract_cache(config, 257, 1, 8, jnp.dtype("float32"))
        found[label] = accounting.declared_bytes_per_token(config, 4), cache.bytes_per_token()
    depth = {config.decoder.depth for config in cli.study(name).variants.values()}
    assert depth == {4} and found == {label: (4 * 4 * count,) * 2 for label, count in elements.items()}


def test_a_studys_codecs_are_named_as_their_rows_and_fit_every_variant(study, variants):
    """Calibrated to what is as good as anything here: unit moments."""
    broken = []
    for label, (config, _) in variants.items():
        entry = accounting.entry(config.attention, config.decoder.width, jnp.dtype("float32"))
        known = {name: unit_statistics(a.shape) for name, a in entry.items()}
        statistics = Statistics((known,), study.calibration_tokens, config.data.context, "text", "model")
        for text in study.codecs:
            assert parse(text).text == text
            try:
                build(parse(text), [entry], statistics, context=config.data.context)
            except ValueError as error:
                broken.append(f"{label}: {error}")
    assert not broken


def unit_statistics(shape: tuple[int, ...]) -> ArrayStatistics:
    """Of an array `[B, K, T, F]` or `[B, T, F]`."""
    *lead, F = *shape[1:-2], shape[-1]
    moments = Moments(100, np.zeros((*lead, F)), np.broadcast_to(np.eye(F), (*lead, F, F)), None, 3.0)
    return ArrayStatistics(moments, moments, None, None)


def test_a_studys_conversions_are_commands_that_make_its_variants(study, tmp_path):
    """Preset, method and steps are those that `experiments.convert` takes of the reference's run.

    What it makes is the variant, without a norm on MLA's latent: the source's keys and values have none.
    """
    source = study.variants[study.reference]
    write_json(tmp_path / "run" / "config.json", to_dict(source))
    run = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "new")]
    for conversion in study.conversions:
        wanted = study.variants[conversion.label].attention
        assert cli.preset(conversion.to).attention == wanted
        fields = {**dataclasses.asdict(wanted), **({"latent_norm": False} if isinstance(wanted, Latent) else {})}
        for method in conversion.methods:
            for fraction in (fraction for fraction in conversion.fractions if fraction > 0):
                how = ["--to", conversion.to, "--method", method, "--fraction", str(fraction)]
                _, _, made = convert.arguments([*run, *how])
                assert type(made.attention) is type(wanted) and dataclasses.asdict(made.attention) == fields
                assert made.train.steps == fraction * source.train.steps
