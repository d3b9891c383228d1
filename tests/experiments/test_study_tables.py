"""Tables of the study against cells worked out by hand, and at every stage of a study.

Three pairs: t(0.975; 2) = 4.3027, so that intervals are mean +- 2.4841 sd, and two-sided p = 1 - t / sqrt(t^2 + 2).
A difference of 3.264 sd is found with 80 % power.
"""

from pathlib import Path
from typing import Any

import pytest

from experiments import report
from experiments.study_tables import STUDY_TABLES, codecs, conversions, rates, variants

REAL = report.read_rows("study", Path(__file__).parents[2])
MHA = (1.40, 1.42, 1.44)


def run(
    label: str, rate: float, seed: int, bits: float | None, size: float = 768.0, width: int = 600
) -> dict[str, Any]:
    about = {"label": label, "matching": "params", "peak_lr": rate, "seed": seed, "cache_bytes_per_token": size}
    figures = {"bits_per_byte": bits, "perplexity": bits and 50 * bits, "parameters": 2_557_632}
    return about | figures | {"config": {"decoder": {"mlp_width": width}}}


def seeds(label: str, above: tuple[float, ...], **options) -> list[dict[str, Any]]:
    return [run(label, 2e-3, s, bits + by, **options) for s, (bits, by) in enumerate(zip(MHA, above))]


TRAINED = [
    *seeds("mqa", (0.079, 0.080, 0.081)),
    *seeds("low_rank48", (0.03, 0.04, 0.05)),
    # 1.40 at the middle rate, 1.43 at both ends: the parabola's bottom is the middle.
    *seeds("mha", (0.0, 0.0, 0.0), size=6144.0, width=512),
    run("mha", 1e-3, 0, 1.43, size=6144.0, width=512),
    run("mha", 4e-3, 0, 1.43, size=6144.0, width=512),
    *seeds("gqa4", (-0.009, -0.010, -0.011), size=3072.0),
    # y = 1.44 - 0.035 x + 0.005 x^2 of x = log2(rate / 2e-3) has its bottom at 3.5.
    *(run("gqa2", rate, 0, bits, size=1536.0) for rate, bits in ((1e-3, 1.48), (2e-3, 1.44), (4e-3, 1.41))),
    # Highest at the middle rate: no bottom.
    *(run("mla", rate, 0, bits, size=1280.0) for rate, bits in ((1e-3, 1.45), (2e-3, 1.50), (4e-3, 1.46))),
]


def cells(table: str) -> list[list[str]]:
    """Of every line, all of which have as many as the head."""
    lines = [
        [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        for line in table.split("\n")
    ]
    assert all(line.startswith("|") and line.endswith("|") for line in table.split("\n"))
    assert {len(line) for line in lines} == {len(lines[0])}
    assert all(set(cell) in ({"-"}, {"-", ":"}) for cell in lines[1])
    return [lines[0], *lines[2:]]


def test_variants_by_hand():
    head, *lines = cells(variants({"a": {"rows": TRAINED[:9]}, "b": {"rows": TRAINED[9:]}}))
    assert head == [
        *("variant", "cache bytes/token", "parameters", "MLP width", "best rate", "seeds", "bits/byte (95 %)"),
        *("perplexity", "bits/byte above `mha`, paired (95 %)", "detectable", "verdict (Holm)", "rank"),
    ]
    # mqa and gqa4: t = 139 and 17.3, p = 0.0001 and 0.003. low_rank48: t = 6.93, p = 0.0202, times 3 for Holm.
    mha = "1.4200 (1.3703, 1.4697)", "71.00"
    gqa4 = "1.4100 (1.3628, 1.4572)", "70.50", "-0.0100 (-0.0125, -0.0075)", "0.0033", "better (better)"
    mqa = "1.5000 (1.4478, 1.5522)", "75.00", "+0.0800 (+0.0775, +0.0825)", "0.0033", "worse (worse)"
    low = "1.4600 (1.3855, 1.5345)", "73.00", "+0.0400 (+0.0152, +0.0648)", "0.0326", "worse (not resolved)"
    alone = "", "not resolved (not resolved)", "1 to 6"
    end, once = "4.0e-03 (fit 2.3e-02), at an end", "2.0e-03, of 1 tried"
    assert lines == [
        ["`mha`", "6,144", "2.558 M", "512", "2.0e-03 (fit 2.0e-03)", "3", *mha, "", "", "", "2 to 4"],
        ["`gqa4`", "3,072", "2.558 M", "600", once, "3", *gqa4, "1 to 3"],
        ["`gqa2`", "1,536", "2.558 M", "600", end, "1", "1.4100", "70.50", "+0.0100", *alone],
        ["`mla`", "1,280", "2.558 M", "600", "1.0e-03, at an end", "1", "1.4500", "72.50", "+0.0500", *alone],
        ["`mqa`", "768", "2.558 M", "600", once, "3", *mqa, "4 to 6"],
        ["`low_rank48`", "768", "2.558 M", "600", once, "3", *low, "3 to 5"],
    ]


def test_pairs_are_of_seeds_that_both_have():
    """Seeds 1 and 2 differ by 0.02 and 0.04: t(0.975; 1) = 12.706, half an interval 0.1271."""
    rows = [*seeds("mha", (0.0, 0.0, 0.0)), run("mqa", 2e-3, 1, 1.44), run("mqa", 2e-3, 2, 1.48)]
    line = cells(variants({"a": {"rows": [*rows, run("mqa", 2e-3, 9, 1.6)]}}))[2]
    assert line[5] == "3" and line[8] == "+0.0300 (-0.0971, +0.1571)" and line[10] == "not resolved (not resolved)"


@pytest.mark.parametrize("label", ["mha", "gqa2"])
def test_one_variant_has_nothing_to_be_compared_with(label):
    """The reference, or a variant whose first run ended before the reference's."""
    rows = {"a": {"rows": [run(label, 2e-3, 0, 1.41)]}}
    (line,) = cells(variants(rows))[1:]
    assert line[4:11] == ["2.0e-03, of 1 tried", "1", "1.4100", "70.50", "", "", ""]
    assert cells(rates(rows))[1:] == [[f"`{label}`", "**1.4100**", ""]]


def test_the_reference_is_that_of_the_files():
    rows = [*seeds("mqa", (0.0, 0.0, 0.0)), *seeds("mha", (0.01, 0.02, 0.03))]
    head, *lines = cells(variants({"a": {"reference": "mqa", "rows": rows}}))
    assert head[8] == "bits/byte above `mqa`, paired (95 %)"
    assert [line[8] for line in lines] == ["", "+0.0200 (-0.0048, +0.0448)"]
    assert cells(conversions({"a": {"reference": "mqa"}}))[0][0] == "from `mqa` to"
    with pytest.raises(ValueError, match="reference=mha, mqa must be one in all files"):
        variants({"a": {"reference": "mqa", "rows": rows}, "b": {"rows": []}})


def test_two_rates_and_those_that_diverged_are_too_few_to_fit():
    rows = [run("mha", rate, 0, bits) for rate, bits in ((1e-3, 1.42), (2e-3, 1.41), (4e-3, None))]
    for some, told in ((rows[:2], "2.0e-03, of 2 tried"), (rows, "2.0e-03, of 3 tried")):
        assert cells(variants({"a": {"rows": some}}))[1][4] == told


def test_the_rate_that_the_study_chose_is_shown():
    """By `best`, though another has the least loss."""
    rows = [run("mha", rate, 0, bits) | {"best": rate == 1e-3} for rate, bits in ((1e-3, 1.42), (2e-3, 1.41))]
    assert cells(variants({"a": {"rows": rows}}))[1][4:7] == ["1.0e-03, of 2 tried", "1", "1.4200"]
    assert cells(rates({"a": {"rows": rows}}))[1] == ["`mha`", "**1.4200**", "1.4100", ""]


def test_rates_by_hand():
    """Of seed 0 alone, which all rates of `mha` have; the least is bold. The parabola of `gqa2` ends far beyond."""
    assert cells(rates({"a": {"rows": TRAINED}})) == [
        ["variant", "1.0e-03", "2.0e-03", "4.0e-03", "at the fitted optimum"],
        ["`mqa`", "", "**1.5000**", "", ""],
        ["`low_rank48`", "", "**1.4600**", "", ""],
        ["`mha`", "1.4300", "**1.4000**", "1.4300", "1.4000 (2.0e-03)"],
        ["`gqa4`", "", "**1.4100**", "", ""],
        ["`gqa2`", "1.4800", "1.4400", "**1.4100**", ""],
        ["`mla`", "**1.4500**", "1.5000", "1.4600", ""],
    ]


def stored(label: str, codec: str, seed: int, size: float, percent: float) -> dict[str, Any]:
    about = {"label": label, "codec": codec, "seed": seed, "cache_bytes": {"per_token": size}}
    return about | {"perplexity_percent": percent}


def test_codecs_by_hand():
    rows = [
        stored("mha", "exact", 0, 6144.0, 0.0),
        stored("mha", "int8", 0, 1664.0, 0.10),
        stored("mha", "nvfp4", 0, 864.4, 5.0),
        stored("mha", "int8", 1, 1664.0, -0.04),
        stored("gqa2", "nvfp4", 0, 216.0, 7.25),
        stored("mqa", "exact", 0, 768.0, 0.0),
    ]
    assert cells(codecs({"a": {"codecs": rows}})) == [
        ["variant", "`int8`", "`nvfp4`"],
        ["`mha`", "1,664 B, +0.03 % (-0.04 to +0.10)", "864 B, +5.00 %"],
        ["`gqa2`", "", "216 B, +7.25 %"],
    ]


def test_conversions_by_hand():
    made = lambda label, method, fraction, bits, scratch: {
        **{"label": label, "method": method, "fraction": fraction, "bits_per_byte": bits},
        **{"source_bits_per_byte": 1.4, "scratch_bits_per_byte": scratch},
    }
    rows = [
        made("gqa2", "mean", 0.1, 1.44, 1.42),
        made("gqa2", "mean", 0.0, 2.91, 1.42),
        made("gqa2", "first", 0.0, 3.1, 1.42),
        made("mla", "whitened", 0.05, 1.5, None),
    ]
    for row in rows[:2]:
        row |= {"parameters": 2_300_416, "scratch_parameters": 2_557_632}
    assert cells(conversions({"a": {"conversions": rows}})) == [
        [
            "from `mha` to",
            "method",
            "parameters",
            "as converted",
            "5% of the steps",
            "10% of the steps",
            "from scratch",
            "its parameters",
            "source",
        ],
        ["`gqa2`", "mean", "2.300 M", "2.9100", "", "1.4400", "1.4200", "2.558 M", "1.4000"],
        ["`gqa2`", "first", "", "3.1000", "", "", "1.4200", "", "1.4000"],
        ["`mla`", "whitened", "", "", "1.5000", "", "", "", "1.4000"],
    ]


@pytest.mark.parametrize("files", [{}, {"rows": {}}, {"rows": {"rows": [], "codecs": [], "conversions": []}}])
@pytest.mark.parametrize("name", STUDY_TABLES)
def test_a_table_without_rows_is_a_head(name, files):
    assert len(cells(STUDY_TABLES[name](files))) == 1


@pytest.mark.parametrize(
    ("kind", "names"),
    [("rows", ("study", "study_rates")), ("codecs", ("study_codecs",)), ("conversions", ("study_conversions",))],
)
def test_every_stage_of_the_committed_study_has_its_tables(kind, names):
    """After each of its results; and without the reference's, which need not be the first."""
    every = [row for file in REAL.values() for row in file[kind]]
    for rows in (every, [row for row in every if row["label"] != "mha"]):
        for end in range(len(rows) + 1):
            files = {"rows": {kind: rows[:end]}}
            labels = {f"`{row['label']}`" for row in rows[:end] if kind != "codecs" or row["codec"] != "exact"}
            for name, table in STUDY_TABLES.items():
                shown = {line[0] for line in cells(table(files))[1:]}
                assert shown == (labels if name in names else set())
