import collections
import hashlib
import itertools

import numpy as np
import pytest

from kvjax.data import Corpus, TrainBatches, documents, eval_batches, load_corpus
from kvjax.data.tokenizer import ByteTokenizer

END = 999


def toy_corpus(*lengths: int) -> Corpus:
    """Documents of the given numbers of text tokens; tokens count up from 0, so each is its own name."""
    ids, starts, token = [], [0], 0
    for length in lengths:
        ids += [END, *range(token, token + length)]
        token += length
        starts.append(len(ids))
    return Corpus(np.array(ids, np.int32), np.array(starts), np.array(lengths))


def test_load_corpus_in_bytes(sotu):
    corpus = load_corpus(sotu, ByteTokenizer(), "validation")
    texts = documents(sotu, "validation")
    assert corpus.num_bytes.tolist() == [len(text) for text in texts]
    assert len(corpus.ids) == 463_332 + 9
    for index, text in enumerate(texts):
        document = corpus.ids[corpus.starts[index] : corpus.starts[index + 1]]
        assert document[0] == 256 and bytes(document[1:].tolist()) == text


def test_load_corpus_in_pairs_is_cached_and_checked(sotu, small_bpe):
    corpus = load_corpus(sotu, small_bpe, "test")
    for index, text in enumerate(documents(sotu, "test")):
        document = corpus.ids[corpus.starts[index] : corpus.starts[index + 1]]
        assert document[0] == small_bpe.end_id
        assert small_bpe.decode(document[1:]).encode() == text
    assert corpus.num_bytes.sum() == 434_538

    folder = sotu.folder() / "tokens"
    (path,) = folder.glob("sotu-test-*.npy")
    written = path.stat().st_mtime_ns
    again = load_corpus(sotu, small_bpe, "test")
    assert path.stat().st_mtime_ns == written
    np.testing.assert_array_equal(again.ids, corpus.ids)
    np.testing.assert_array_equal(again.starts, corpus.starts)

    good = path.read_bytes()
    for bad in (good[:-400], good[:-4] + bytes(4), good[:50], b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{path} is damaged, delete it"):
            load_corpus(sotu, small_bpe, "test")
    path.unlink()
    load_corpus(sotu, ByteTokenizer(), "test")
    (other,) = folder.glob("sotu-test-*.npy")
    assert other != path


def test_train_batches_are_pure(sotu):
    corpus = load_corpus(sotu, ByteTokenizer(), "validation")
    steps = [7, 0, 5000, 3, 7, 123_456]
    one = TrainBatches(corpus, 61, 5, seed=11)
    for step in steps:
        fresh = TrainBatches(corpus, 61, 5, seed=11)[step]
        for name, array in one[step].items():
            assert array.dtype == np.int32 and array.shape == (5, 61)
            np.testing.assert_array_equal(array, fresh[name])
    assert not np.array_equal(one[0]["tokens_BT"], TrainBatches(corpus, 61, 5, seed=12)[0]["tokens_BT"])


def test_train_batches_never_change(sotu):
    """If this fails, every run that is resumed, or compared with an older one, sees other batches."""
    batches = TrainBatches(toy_corpus(5, 7, 11), context=3, batch_size=2, seed=13)
    golden = hashlib.sha256()
    for step in range(20):
        golden.update(batches[step]["tokens_BT"].astype("<i4").tobytes())
    assert golden.hexdigest()[:16] == "2751bdbec612b386"


def test_targets_are_the_next_tokens():
    corpus = toy_corpus(5, 7, 11)
    ring = [*corpus.ids, *corpus.ids]
    following = collections.defaultdict(set)
    for this, after in itertools.pairwise(ring):
        following[int(this)].add(int(after))
    batches = TrainBatches(corpus, context=5, batch_size=3, seed=1)
    for step in range(50):
        batch = batches[step]
        np.testing.assert_array_equal(batch["tokens_BT"][:, 1:], batch["targets_BT"][:, :-1])
        for this, after in zip(batch["tokens_BT"].ravel(), batch["targets_BT"].ravel()):
            assert int(after) in following[int(this)]


@pytest.mark.parametrize("lengths", [(29, 30), (60, 30, 26)])
def test_an_epoch_covers_the_corpus_once(lengths):
    corpus = toy_corpus(*lengths)  # 61 tokens leave 5 out of each epoch, 119 = 7 * 17 none.
    batches = TrainBatches(corpus, context=7, batch_size=1, seed=3)
    windows = len(corpus.ids) // 7
    assert batches.windows_per_epoch == windows
    expected = collections.Counter(corpus.ids.tolist())
    firsts = []
    for epoch in range(9):
        steps = range(epoch * windows, (epoch + 1) * windows)
        targets = [batches[step]["targets_BT"][0].tolist() for step in steps]
        seen = collections.Counter(itertools.chain(*targets))
        assert seen <= expected and seen.total() == windows * 7
        firsts.append([target[0] for target in targets])
    assert len({tuple(sorted(first)) for first in firsts}) > 2, "window boundaries do not move between epochs"
    assert len({tuple(first) for first in firsts}) == 9, "epochs are in the same order"


def test_batches_may_span_epochs():
    corpus = toy_corpus(29, 30)
    single = TrainBatches(corpus, context=7, batch_size=1, seed=3)
    triple = TrainBatches(corpus, context=7, batch_size=3, seed=3)
    for step in range(12):
        rows = [single[step * 3 + row]["tokens_BT"] for row in range(3)]
        np.testing.assert_array_equal(triple[step]["tokens_BT"], np.concatenate(rows))


def test_host_rows_are_slices_of_the_global_batch():
    batches = TrainBatches(toy_corpus(31, 37), context=5, batch_size=7, seed=2)
    for step in (0, 1, 17):
        for start, stop in [(0, 7), (0, 3), (3, 7), (6, 7), (2, 2)]:
            for name, part in batches.rows(step, start, stop).items():
                np.testing.assert_array_equal(part, batches[step][name][start:stop])


def test_impossible_training_batches():
    corpus = toy_corpus(3, 4)
    assert TrainBatches(corpus, context=8, batch_size=1, seed=0)[0]["tokens_BT"].shape == (1, 8)
    with pytest.raises(ValueError, match=r"^data.context=9 must be less than the 9 tokens of the corpus$"):
        TrainBatches(corpus, context=9, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"^data.context=0 must be at least 1$"):
        TrainBatches(corpus, context=0, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"^batch_size=0 must be at least 1$"):
        TrainBatches(corpus, context=2, batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"^seed=-1 must be at least 0$"):
        TrainBatches(corpus, context=2, batch_size=1, seed=-1)
    batches = TrainBatches(corpus, context=2, batch_size=3, seed=0)
    for step, start, stop in [(-1, 0, 3), (0, -1, 2), (0, 2, 1), (0, 0, 4)]:
        with pytest.raises(ValueError, match=f"^rows {start}:{stop} of step {step}: must lie in 0:3, step >= 0$"):
            batches.rows(step, start, stop)


def test_eval_batches_by_hand():
    first, second = eval_batches(toy_corpus(4, 0, 3, 1), context=3, batch_size=3)
    assert first["tokens_BT"].tolist() == [[END, 0, 1], [2, 0, 0], [END, 4, 5]]
    assert first["targets_BT"].tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 6]]
    assert first["weights_BT"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert first["document_B"].tolist() == [0, 0, 2]
    assert second["tokens_BT"].tolist() == [[END, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert second["targets_BT"].tolist() == [[7, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert second["weights_BT"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert second["document_B"].tolist() == [3, -1, -1]
    assert {name: str(array.dtype) for name, array in first.items()} == {
        "tokens_BT": "int32",
        "targets_BT": "int32",
        "weights_BT": "float32",
        "document_B": "int32",
    }


@pytest.mark.parametrize("context", [1, 7, 13, 1009])
def test_eval_predicts_every_text_token_once(context):
    lengths = (13, 1, 26, 27, 0, 101)
    batches = eval_batches(toy_corpus(*lengths), context, batch_size=5)
    predicted = np.concatenate([batch["targets_BT"][batch["weights_BT"] == 1] for batch in batches])
    assert sorted(predicted.tolist()) == list(range(sum(lengths)))
    per_document = collections.Counter()
    for batch in batches:
        assert batch["tokens_BT"].shape == (5, context)
        for document, weights in zip(batch["document_B"].tolist(), batch["weights_BT"]):
            per_document[document] += int(weights.sum())
    assert per_document.pop(-1, 0) == 0
    assert per_document == {0: 13, 1: 1, 2: 26, 3: 27, 5: 101}


def test_eval_of_real_text_spells_it(sotu):
    batches = eval_batches(load_corpus(sotu, ByteTokenizer(), "test"), context=257, batch_size=17)
    texts = [bytearray() for _ in range(11)]
    for batch in batches:
        for row, document in enumerate(batch["document_B"].tolist()):
            text = batch["targets_BT"][row][batch["weights_BT"][row] == 1]
            if document >= 0:
                texts[document] += bytes(text.tolist())
            else:
                assert text.size == 0
    assert texts == documents(sotu, "test")


def test_impossible_evaluation():
    with pytest.raises(ValueError, match=r"^data.context=0 must be at least 1$"):
        eval_batches(toy_corpus(3), context=0, batch_size=1)
    with pytest.raises(ValueError, match=r"^batch_size=0 must be at least 1$"):
        eval_batches(toy_corpus(3), context=1, batch_size=0)
