"""Documents of a text dataset, by its TFDS name, without TensorFlow."""

import contextlib
import difflib
import glob
import importlib.util
import inspect
import io
import os
import re
import socket
import sys
import types
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from kvjax.data.config import DataConfig
from kvjax.data.store import file_name, locked


def documents(config: DataConfig, split: str) -> list[bytes]:
    """All documents of a split ("train", "validation" or "test"), as UTF-8; prepared on first use.

    Raises ValueError where the dataset, the split or the text feature does not exist, where the source files
    are neither here nor reachable, and where a document is not UTF-8.
    """
    with _quiet(), _tensorflow_stand_in():
        builder = _builder(config)
        feature = _text_feature(config.name, builder.info.features)
        if not builder.is_prepared():
            with locked(config.folder() / "locks" / file_name(config.name)):
                builder = _builder(config)  # Another process may have prepared it meanwhile.
                if not builder.is_prepared():
                    _prepare(builder, config)
        splits = list(builder.info.splits)
        if split not in splits:
            raise ValueError(f"data.name={config.name!r} has no split {split!r}: it has {', '.join(splits)}")
        texts = [example[feature] for example in builder.as_data_source(split=split)]
    if not texts:
        raise ValueError(f"data.name={config.name!r} split {split!r} has no documents")
    for index, text in enumerate(texts):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{config.name} {split} document {index} is not UTF-8 at byte {error.start}: {error.reason}"
            ) from None
    return texts


def _builder(config: DataConfig) -> Any:
    """The builder of a dataset, or ValueError with the nearest names."""
    import tensorflow_datasets as tfds

    # Datasets register themselves when they are imported.
    import tensorflow_datasets.text

    import kvjax.data.sotu  # noqa: F401

    family, _, variety = config.name.partition(":")[0].partition("/")
    known = sorted(set(tfds.list_builders(with_community_datasets=False)))
    if family not in known:
        near = difflib.get_close_matches(family, known) or ["sotu", "tiny_shakespeare"]
        raise ValueError(f"data.name={config.name!r} is not a TFDS dataset: the nearest are {', '.join(near)}")
    varieties = sorted(tfds.builder_cls(family).builder_configs)
    if variety and variety not in varieties:
        near = difflib.get_close_matches(variety, varieties, cutoff=0) or ["none"]
        raise ValueError(
            f"data.name={config.name!r}: the nearest configurations of {family} are {', '.join(near)}"
        )
    try:
        # TFDS's default file format cannot be written or read without TensorFlow.
        return tfds.builder(config.name, data_dir=config.folder(), file_format="array_record")
    except ImportError as error:
        raise _needs(config.name, "TensorFlow", error) from error
    except (AssertionError, ValueError) as error:  # An unknown version.
        raise ValueError(f"data.name={config.name!r} cannot be opened: {_line(error)}") from error


def _text_feature(name: str, features: Any) -> str:
    """The feature to read: the text feature called "text", or the only one there is."""
    import tensorflow_datasets as tfds

    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    raise ValueError(
        f"data.name={name!r} must have a text feature called 'text', or exactly one: "
        f"its text features are {texts}, all its features {sorted(features)}"
    )


def _prepare(builder: Any, config: DataConfig) -> None:
    """Download and write the dataset; ValueError says what is missing."""
    import tensorflow_datasets as tfds

    source = inspect.getsource(sys.modules[type(builder).__module__])
    if (
        re.search(r"lazy_imports\w*(\.| import )apache_beam", source)
        and importlib.util.find_spec("apache_beam") is None
    ):
        raise _needs(config.name, "Apache Beam")
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and config.manual_dir is None:
        steps = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise ValueError(f"data.name={config.name!r} needs data.manual_dir: {steps}")
    _require_source(builder, config)
    download = tfds.download.DownloadConfig(manual_dir=config.manual_dir, try_download_gcs=False)
    try:
        builder.download_and_prepare(
            download_dir=config.folder() / "downloads", download_config=download, file_format="array_record"
        )
    except ImportError as error:
        raise _needs(config.name, "TensorFlow", error) from error
    except tfds.download.DownloadError as error:
        raise ValueError(f"data.name={config.name!r} cannot be downloaded: {_line(error)}") from error
    except Exception as error:
        # TFDS does not export the class of this error.
        if type(error).__name__ == "NonMatchingChecksumError":
            raise ValueError(f"data.name={config.name!r} has a wrong source file: {_line(error)}") from error
        raise


def _require_source(builder: Any, config: DataConfig) -> None:
    """Fail at once where every source file is missing and its host unknown: TFDS would retry for minutes."""
    urls = type(builder).url_infos or {}
    files = sorted({info.filename for info in urls.values()})
    if config.manual_dir is not None and any(
        os.path.exists(os.path.join(config.manual_dir, file)) for file in files
    ):
        return
    if urllib.request.getproxies():  # The proxy finds hosts that have no address here.
        return
    for host in sorted({str(urllib.parse.urlsplit(url).hostname) for url in urls}):
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            shown = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
            place = "a folder and name it in data.manual_dir"
            if config.manual_dir is not None:
                place = f"data.manual_dir={config.manual_dir!r}"
            raise ValueError(
                f"data.name={config.name!r} cannot be downloaded, {host} is not reachable: "
                f"place its source ({shown}) in {place}"
            ) from None


def _needs(name: str, library: str, error: Exception | None = None) -> ValueError:
    cause = f" ({_line(error)})" if error else ""
    return ValueError(
        f"data.name={name!r} needs {library}, which is not installed{cause}: sotu and tiny_shakespeare do without"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS's bars, banners and warnings off the terminal, and put everything back."""
    from absl import logging
    from tensorflow_datasets.core.utils import tqdm_utils

    bars, verbosity = tqdm_utils._active, logging.get_verbosity()
    tqdm_utils.display_progress_bar(enable=False)
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm_utils.display_progress_bar(enable=bars)
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _tensorflow_stand_in() -> Iterator[None]:
    """Give TFDS the few file functions of TensorFlow that builders call, where TensorFlow is not installed.

    Any other use raises ImportError, as it would without this.
    """
    from tensorflow_datasets.core.utils import lazy_imports_utils

    lazy = cast(dict[str, Any], vars(lazy_imports_utils.tensorflow))
    if "_module" in lazy or importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    lazy["_module"] = _TensorFlowFiles("tensorflow")
    try:
        yield
    finally:
        del lazy["_module"]


def _local(path: Any) -> str:
    if "://" in os.fspath(path):
        raise ImportError(f"tensorflow.io.gfile for {os.fspath(path)}")
    return os.fspath(path)


def _open_local(path: Any, mode: str = "r") -> IO[Any]:
    return Path(_local(path)).open(mode, encoding=None if "b" in mode else "utf-8")


class _TensorFlowFiles(types.ModuleType):
    """`tf.io.gfile` over local files."""

    io = types.SimpleNamespace(
        gfile=types.SimpleNamespace(
            GFile=_open_local,
            exists=lambda path: os.path.exists(_local(path)),
            glob=lambda pattern: sorted(glob.glob(_local(pattern))),
            isdir=lambda path: os.path.isdir(_local(path)),
            listdir=lambda path: sorted(os.listdir(_local(path))),
        )
    )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"tensorflow.{name}")
