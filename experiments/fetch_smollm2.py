"""The pretrained SmolLM2-135M-Instruct, fetched and converted once: `python -m experiments.fetch_smollm2`.

It lands in $KVJAX_DATA, or ~/.cache/kvjax where that is unset: a download of 93 MB, 635 MB on disk.
"""

from collections.abc import Sequence

from experiments import cli


def run(argv: Sequence[str]) -> None:
    """Fetch the model, and say where it is and what."""
    cli.parser("experiments.fetch_smollm2", __doc__).parse_args(argv)
    from kvjax.pretrained.smollm2 import LICENSE, QUANTIZATION, smollm2

    directory = smollm2()
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}\n{size / 1e6:.0f} MB, licence {LICENSE}: {QUANTIZATION}")


if __name__ == "__main__":
    cli.main(run)
