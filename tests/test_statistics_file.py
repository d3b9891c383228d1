import dataclasses
import hashlib
import json

import numpy as np
import pytest

from kvjax.codecs.statistics import ArrayStatistics, Moments, Statistics
from kvjax.pretrained.tensors import SINGLE, TensorFiles, write_tensors
from kvjax.statistics_file import RECORD, load_statistics, save_statistics

K, F = 2, 4


def drawn(rng, *lead):
    normal = lambda *shape: 1e3 * rng.standard_normal(shape)
    part = lambda count: Moments(
        count, normal(*lead, F), normal(*lead, F, F), normal(K * F, K * F) if lead else None, float(rng.random())
    )
    return part(3), part(2**40 + 1), normal(*lead, F, F)


@pytest.fixture
def statistics():
    rng = np.random.default_rng(0)
    k, v, latent = drawn(rng, K), drawn(rng, K), drawn(rng)
    layer = {"k": ArrayStatistics(*k, None), "v": ArrayStatistics(*v[:2], None, v[2])}
    return Statistics((layer, {"latent": ArrayStatistics(*latent, latent[2] + 1)}), 4096, 512, "a model", "a text")


@pytest.fixture
def saved(statistics, tmp_path):
    save_statistics(statistics, tmp_path / "new" / "calibration")
    return tmp_path / "new" / "calibration"


def test_what_is_saved_is_loaded(statistics, saved):
    loaded = load_statistics(saved)
    facts = lambda s: (s.tokens, s.context, s.model, s.data, [list(layer) for layer in s.layers])
    assert facts(loaded) == facts(statistics)
    for layer, again in zip(statistics.layers, loaded.layers):
        for name, array in layer.items():
            for part in ("first", "rest"):
                one, other = getattr(array, part), getattr(again[name], part)
                assert (one.count, one.amax, one.cross is None) == (other.count, other.amax, other.cross is None)
                for field in ("total", "outer") if one.cross is None else ("total", "outer", "cross"):
                    # To 2^-48, where float32 alone would be 2^-25 off.
                    np.testing.assert_allclose(getattr(other, field), getattr(one, field), rtol=4e-15)
            for field in ("queries", "output"):
                one, other = getattr(array, field), getattr(again[name], field)
                assert (one is None) == (other is None)
                if one is not None:
                    np.testing.assert_allclose(other, one, rtol=4e-15)
    assert [path.name for path in saved.parent.iterdir()] == ["calibration"]


def test_nothing_is_replaced(statistics, saved):
    with pytest.raises(ValueError, match="calibration exists; choose a new directory"):
        save_statistics(statistics, saved)


def test_what_is_not_finite_is_neither_saved_nor_loaded(statistics, saved, tmp_path):
    array = statistics.layers[0]["k"]
    for bad in (np.nan, np.inf, 1e39):
        queries = array.queries.copy()
        queries[1, 2, 3] = bad
        layer = statistics.layers[0] | {"k": dataclasses.replace(array, queries=queries)}
        broken = dataclasses.replace(statistics, layers=(layer,))
        with pytest.raises(ValueError, match=r"layers\.0\.k\.queries must be finite"):
            save_statistics(broken, tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def edit_record(saved, change):
    record = json.loads((saved / RECORD).read_text())
    change(record)
    (saved / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("model"), "statistics.json: model is missing"),
        (lambda r: r.update(context=0), "statistics.json: context=0 must be at least 1"),
        (lambda r: r["layers"][1]["latent"].pop("counts"), "layers[1].latent: counts is missing"),
        (
            lambda r: r["layers"][0]["k"]["counts"].update(rest=-1),
            "layers[0].k.counts: rest=-1 must be at least 0",
        ),
        (lambda r: r["layers"][0]["k"].update(features="4"), "layers[0].k: features='4' must be of type int"),
        (lambda r: r["layers"][0]["k"].update(heads=3), "'layers.0.k.first.cross' has shape [2, 8, 8], must be"),
        (lambda r: r["layers"][0]["k"].update(output=True), "tensor 'layers.0.k.output' is missing"),
        (lambda r: r["layers"][0].pop("v"), "tensor 'layers.0.v.first.cross' is none that statistics.json has"),
        (lambda r: r["layers"].append(3), "layers[2] must be a JSON object"),
    ],
)
def test_records_that_do_not_fit_are_refused(saved, change, message):
    edit_record(saved, change)
    with pytest.raises(ValueError) as error:
        load_statistics(saved)
    assert message in str(error.value) and str(saved) in str(error.value)


def test_damaged_arrays_are_refused(saved):
    content = bytearray((saved / SINGLE).read_bytes())
    content[-5] ^= 1
    (saved / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was saved"):
        load_statistics(saved)
    (saved / SINGLE).write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor"):
        load_statistics(saved)
    (saved / SINGLE).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_statistics(saved)


def test_values_that_are_not_finite_are_refused_by_name(saved):
    files = TensorFiles.open(saved)
    tensors = {name: files.read(name, files.shape(name)) for name in files.names}
    tensors["layers.1.latent.rest.outer"][0, 1, 2] = np.nan
    write_tensors(saved / SINGLE, tensors, {})
    digest = hashlib.sha256((saved / SINGLE).read_bytes()).hexdigest()
    edit_record(saved, lambda record: record.update(sha256=digest))
    with pytest.raises(ValueError, match=r"tensor 'layers\.1\.latent\.rest\.outer' must be finite"):
        load_statistics(saved)
