"""Texts of codecs, and what they say."""

import numpy as np
import pytest

from kvjax.codecs.base import Exact
from kvjax.codecs.floats import Fp8, Fp8Block, Half, Mx, NvFp4
from kvjax.codecs.integers import Int, IntPerChannel
from kvjax.recipe_steps import FORMATS, HEADROOM, MAPS, Step, codec_of
from kvjax.recipes import ALLOCATIONS, Recipe, needs_statistics, parse


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("exact", Exact()),
        ("bf16", Half("bfloat16")),
        ("fp16", Half("float16")),
        ("int8", Int(8)),
        ("int4", Int(4, None, True)),
        ("int4:g32", Int(4, 32, True)),
        ("int2:asym:g16", Int(2, 16, False)),
        ("int4:channel32", IntPerChannel(4, 32)),
        ("int2:channel32:r128", IntPerChannel(2, 32, 128)),
        ("fp8", Fp8.calibrated(HEADROOM)),
        ("fp8:h2", Fp8.calibrated(2.0)),
        ("fp8:scale1", Fp8(np.float32(1.0))),
        ("fp8:scale2.5e-3", Fp8(np.float32(0.0025))),
        ("fp8:b128", Fp8Block(128)),
        ("mxfp8", Mx("e4m3")),
        ("mxfp4", Mx("e2m1")),
        ("nvfp4", NvFp4.calibrated(1.0, 1.25)),
        ("nvfp4:h2", NvFp4.calibrated(2.0)),
    ],
)
def test_formats(text, codec):
    ((name, (step,)),) = parse(text).arrays
    assert name == "" and codec_of(step) == codec
    assert needs_statistics(parse(text)) == (text in ("fp8", "fp8:h2", "nvfp4", "nvfp4:h2"))


def test_parts_of_a_recipe():
    recipe = parse("v=int4:g32:asym, k=pca75%:rest:nomean+hadamard+nvfp4:h2,sinks=4,recent=64,layers=1-29")
    k = (
        Step("pca", "75%", (("nomean", True), ("rest", True))),
        Step("hadamard"),
        Step("nvfp4", "", (("h", 2.0),)),
    )
    v = (Step("int4", "", (("g", 32), ("asym", True))),)
    assert recipe == Recipe((("k", k), ("v", v)), 4, 64, "rotated", (1, 29))
    unranked = Recipe((("k", (Step("query"), Step("int8"))),), keys="before_rope", budget="50%", allocate="water")
    assert parse("allocate=water,keys=before_rope,budget=50%,k=query+int8") == unranked
    assert (
        needs_statistics(unranked) and needs_statistics(parse("random3")) and not needs_statistics(parse("haar"))
    )


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("v=int8 , k=int4:asym:g032", "k=int4:g32:asym,v=int8"),
        ("pca048+exact", "pca48"),
        ("k=pca075.50%:joint:nomean+int8", "k=pca75.5%:nomean:joint+int8"),
        ("random48:seed0+haar:seed0+fp8:scale1.0", "random48+haar+fp8:scale1"),
        ("random48:seed3+nvfp4:h1.250", "random48:seed3+nvfp4"),
        ("recent=0,layers=2-2,keys=rotated,int8,sinks=04", "int8,sinks=4,layers=2"),
        ("budget=0100,k=pca", "k=pca,budget=100,allocate=uniform"),
        ("kivi4", "k=int4:channel32,v=int4:g32:asym"),
        ("layers=1-29, kivi2", "k=int2:channel32:r128,v=int2:g32:asym,layers=1-29"),
    ],
)
def test_canonical_text(text, canonical):
    assert parse(text).text == canonical
    assert parse(canonical) == parse(text)


def drawn(rng):
    """A recipe that makes sense, in any order of its parts."""

    def options(name, allowed):
        values = {int: int(rng.integers(1, 40)), float: float(rng.choice([0.001, 1.25, 3.0])), bool: True}
        chosen = [option for option in allowed if rng.random() < 0.4]
        if "channel" in chosen:
            return (("channel", 32), ("r", 64))[: rng.integers(1, 3)]
        chosen = [o for o in chosen if o != "r" and (o != "all" or "rest" not in chosen)]
        return tuple((o, values[allowed[o]]) for o in (chosen[:1] if name == "fp8" else chosen))

    def chain(open_rank):
        steps = []
        if open_rank or rng.random() < 0.5:
            kind = str(rng.choice([name for name in MAPS if name not in ("hadamard", "haar")]))
            size = "" if open_rank else str(rng.choice(["3", "48", "75%", "12.5%"]))
            steps.append(Step(kind, size, options(kind, MAPS[kind])))
        for name in ("haar",) if open_rank else ("haar", "hadamard"):
            if rng.random() < 0.3:
                steps.append(Step(name, "", options(name, MAPS[name])))
        name = str(rng.choice([name for name in FORMATS if name != "exact"]))
        return (*steps, Step(name, "", options(name, FORMATS[name])))

    budget = rng.choice([None, "50%", "1536"])
    names = [""] if rng.random() < 0.3 else ["k", "latent_v"][: rng.integers(1, 3)]
    arrays = tuple((name, chain(budget is not None)) for name in names)
    first = int(rng.integers(0, 3))
    return Recipe(
        arrays,
        int(rng.integers(0, 3)),
        int(rng.integers(0, 3)),
        str(rng.choice(["rotated", "before_rope"])),
        None if rng.random() < 0.5 else (first, first + int(rng.integers(0, 12))),
        budget,
        None if budget is None else str(rng.choice(ALLOCATIONS)),
    )


def test_parsing_undoes_writing():
    rng = np.random.default_rng(0)
    for _ in range(300):
        recipe = drawn(rng)
        text = parse(recipe.text).text
        assert text == parse(text).text
        # Options that were drawn as their defaults are left out of what is read back, and of nothing else.
        dropped = lambda step: Step(
            step.name, step.size, tuple((o, v) for o, v in step.options if not (o == "h" and v == HEADROOM))
        )
        arrays = tuple((name, tuple(map(dropped, chain))) for name, chain in recipe.arrays)
        parsed = parse(",".join(rng.permutation(recipe.text.split(","))))
        assert parsed == Recipe(arrays, *(getattr(recipe, name) for name in list(vars(recipe))[1:]))


@pytest.mark.parametrize(
    ("size", "features", "rank"),
    [
        ("48", 64, 48),
        ("75%", 24, 18),
        ("12.5%", 4, 1),
        ("37.5%", 4, 2),
        ("62.5%", 4, 3),
        ("1%", 24, 1),
        ("99%", 9, 9),
    ],
)
def test_ranks(size, features, rank):
    """Of 37.5% and 62.5% of 4, which are 1.5 and 2.5, both halves go up."""
    assert parse(f"pca{size}").arrays[0][1][0].rank(features) == rank


NAMES = (
    "bf16, exact, fp16, fp8, haar, hadamard, int2, int4, int8, keyquery, mxfp4, mxfp8, nvfp4, output, pca, query"
)


@pytest.mark.parametrize(
    ("text", "part", "message"),
    [
        ("int5", "int5", "codec='int5' is unknown; did you mean 'int8'?"),
        ("k=int8,v=pcaa4", "v=pcaa4", "codec='pcaa4' is unknown; did you mean 'pca'?"),
        ("INT8", "INT8", f"codec='INT8' is unknown; choose from {NAMES}, querydiag, random"),
        ("kivi3", "kivi3", "'kivi3' must be kivi4 or kivi2, and stand alone"),
        ("k=kivi4", "k=kivi4", "'kivi4' must be kivi4 or kivi2, and stand alone"),
        ("", "", "there must be a codec, as int8 or k=int8"),
        ("k=", "k=", "there must be a codec, as int8 or k=int8"),
        ("sink=4,int8", "sink=4", "option 'sink' is unknown; did you mean 'sinks'?"),
        (
            "K=int8",
            "K=int8",
            "'K' must be an array's name, as k or v, or one of sinks, recent, keys, layers, budget, allocate",
        ),
        ("k=int8,k=int4", "k=int4", "there is another codec for k already; leave one out"),
        ("kivi4,v=int8", "v=int8", "there is another codec for v already; leave one out"),
        ("int8,int4", "int4", "there is another codec for every array already; leave one out"),
        ("int8,sinks=4,sinks=5", "sinks=5", "sinks is given twice; leave one out"),
        ("int8,sinks=4.5", "sinks=4.5", "'4.5' must be an integer of at least 0, as 4"),
        ("int8,recent=-1", "recent=-1", "'-1' must be an integer of at least 0, as 4"),
        ("int8,keys=befor_rope", "keys=befor_rope", "keys='befor_rope' is unknown; did you mean 'before_rope'?"),
        ("k=pca,budget=9,allocate=wate", "allocate=wate", "allocate='wate' is unknown; did you mean 'water'?"),
        ("int8,layers=3-1", "layers=3-1", "layers=3-1 must begin with the lower one; nearest: layers=1-3"),
        (
            "int8,layers=1-",
            "layers=1-",
            "layers='1-' must be a layer, as 2, or the first and the last of some, as 0-3",
        ),
        ("k=pca,budget=0%", "budget=0%", "budget=0% must be at least 1, or above 0%"),
        ("k=pca,budget=1.5", "budget=1.5", "budget='1.5' must be an integer, as 48, or a percentage, as 75%"),
        ("pca0", "pca0", "rank=0 must be at least 1, or above 0%"),
        ("pca101%", "pca101%", "rank=101% must be at most 100%"),
        ("hadamard64", "hadamard64", "hadamard64 must have no rank; nearest: hadamard"),
        ("int8+pca4", "int8+pca4", "a fitted map must come first, and a format last; nearest: pca4+int8"),
        (
            "haar+int8+pca4",
            "haar+int8+pca4",
            "a fitted map must come first, and a format last; nearest: pca4+haar+int8",
        ),
        ("bf16+int8", "bf16+int8", "int8 must be left out: bf16 is the one format of this chain"),
        ("pca4+query4", "pca4+query4", "query4 must be left out: pca4 is the one fitted map of this chain"),
        (
            "k=pca+hadamard,budget=50%",
            "k=pca+hadamard",
            "hadamard, which few ranks have, must not follow a map without a rank; nearest: haar",
        ),
        ("int4:gg3", "int4:gg3", "option of int4='gg' is unknown; did you mean 'g'?"),
        ("int4:g3x", "int4:g3x", "'g3x' must be an integer, as g32"),
        ("int4:asym2", "int4:asym2", "'asym2' must be asym alone"),
        ("nvfp4:h-1", "nvfp4:h-1", "'h-1' must be a number, as h1.5"),
        ("nvfp4:h0", "nvfp4:h0", "headroom h=0.0 must be a finite number above 0"),
        ("fp8:scale0", "fp8:scale0", "scale=0.0 must be at least 1e-30 and below 1e+30"),
        ("int4:g32:g32", "int4:g32:g32", "g is given twice; leave one out"),
        ("int4:g32:channel32", "int4:g32:channel32", "g does not go with channel; leave one out"),
        ("pca4:rest:all", "pca4:rest:all", "rest does not go with all; leave one out"),
        ("mxfp4:b16", "mxfp4:b16", "mxfp4 must have no options, not 'b16'; nearest: mxfp4"),
        ("int4:r128", "int4:r128", "r128 must go with scales along time, as int4:channel32:r128"),
        (
            "int4:channel32:r100",
            "int4:channel32:r100",
            "residual=100 must be a multiple of tokens=32; nearest tokens: 25",
        ),
        ("sinks=4", None, "there must be a codec, as int8 or k=int8"),
        ("int8,k=int4", None, "a codec for every array does not go with k=; name every array"),
        ("k=pca+int8", None, "pca must have a rank, as pca48, or go with a budget, as budget=50%"),
        ("k=pca4,budget=50%", None, "budget=50% must go with a map that has no rank, as k=pca+int8"),
        ("int8,allocate=water", None, "allocate=water must go with a budget, as budget=50%"),
    ],
)
def test_what_makes_no_sense_is_refused(text, part, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    where = f"recipe {text!r}" if part is None else f"recipe {text!r}, part {part!r}"
    assert str(error.value) == f"{where}: {message}"
