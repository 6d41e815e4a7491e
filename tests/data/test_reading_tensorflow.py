"""TFRecord, ArrayRecord of Examples, TFDS. TensorFlow takes 13 s to import: all is slow."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lemur_jax.config import ConfigError
from lemur_jax.data.reading import examples, formats
from lemur_jax.data.sources import SourceConfig, documents, shards

pytestmark = pytest.mark.slow
RECORDS = st.lists(st.tuples(st.text("aé\n\u2028漢", max_size=30), st.integers(0, 9)), max_size=12)
relaxed = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


def source(files, **fields):
    fields = {"name": "code", "rate": 1.0, "validation_fraction": 1e-9} | fields
    return SourceConfig(train_files=str(files), text_key="body", **fields)


def serialised(tf, text, number):
    feature = {
        "body": tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()])),
        "stars": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
        "many": tf.train.Feature(float_list=tf.train.FloatList(value=[0.5, 2.0])),
        "none": tf.train.Feature(),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write(tf, path, records, gz=False):
    options = tf.io.TFRecordOptions(compression_type="GZIP") if gz else None
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for text, number in records:
            writer.write(serialised(tf, text, number))


def expected(records):
    return [(text, {"stars": n, "many": [0.5, 2.0], "none": None}) for text, n in records]


def read(path, **fields):
    return [(d.text, dict(d.meta)) for d in documents(source(path, **fields))]


@pytest.mark.parametrize("suffix", ["tfrecord-00000-of-00001", "tfrecord.gz"])
@relaxed
@given(records=RECORDS)
def test_tfrecord(tf, suffix, tmp_path, records):
    """Red if features of one value stay lists, or gzip is not told to TensorFlow."""
    write(tf, tmp_path / f"x.{suffix}", records, gz=suffix.endswith("gz"))
    assert read(tmp_path / f"x.{suffix}") == expected(records)


def test_tfrecord_in_object_storage(tf, tmp_path):
    """Red if TensorFlow is given a URL that only fsspec knows."""
    fsspec = pytest.importorskip("fsspec")
    write(tf, tmp_path / "x", [("a", 1)])
    fsspec.filesystem("memory").pipe("/tf/x.tfrecord", (tmp_path / "x").read_bytes())
    assert read("memory://tf/x.tfrecord") == expected([("a", 1)])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not example"])
def test_bad_tfrecord(tf, tmp_path, damage):
    """Red if a record whose checksum is wrong, or the file's truncated end, is passed over."""
    path = tmp_path / "x.tfrecord"
    write(tf, path, [("text " * 50, 1)] * 10)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-20])
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    else:
        with tf.io.TFRecordWriter(str(path)) as writer:
            writer.write(b"no example")
    words = {"not example": "record 1 is not a tf.train.Example"}.get(
        damage, "cannot be read after record"
    )
    with pytest.raises(ConfigError, match=words) as error:
        read(path)
    assert "x.tfrecord" in str(error.value)
    assert len(read(path, bad_records="count")) < 10


def test_array_record_of_examples(tf, tmp_path):
    """Red if records are taken for JSON."""
    module = pytest.importorskip("array_record.python.array_record_module")
    records = [("a", 1), ("b\n", 2)]
    writer = module.ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    for text, number in records:
        writer.write(serialised(tf, text, number))
    writer.close()
    assert read(tmp_path / "x.array_record") == expected(records)


@pytest.fixture(scope="module")
def prepared(tf, tmp_path_factory):
    """A TFDS data set of 20 examples, prepared as `tfds build` does, from no network."""
    tfds = pytest.importorskip("tensorflow_datasets")
    directory = tmp_path_factory.mktemp("tfds")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        MODULE_PATH = ""
        pkg_dir_path = directory

        def _info(self):
            features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "stars": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(20):
                yield n, {"body": f"text {n} é", "stars": n}

    builder = Tiny(data_dir=str(directory))
    builder.download_and_prepare()
    return builder.data_dir


def test_tfds(prepared, monkeypatch):
    """Red if a slice of a split is read twice, or another split than the named one."""
    tfds = pytest.importorskip("tensorflow_datasets")
    peer = tfds.builder_from_directory(prepared).as_dataset(split="train", shuffle_files=False)
    expected = [(e["body"].decode(), {"stars": int(e["stars"])}) for e in peer.as_numpy_iterator()]
    monkeypatch.setattr(formats.units, "__defaults__", (None, 100))
    config = source(f"{prepared}@train", format="tfds")
    assert len(shards(config)) > 2
    assert [(d.text, dict(d.meta)) for d in documents(config)] == expected
    assert sorted(text for text, _ in expected) == sorted(f"text {n} é" for n in range(20))


def test_bad_tfds(prepared):
    """Red if TFDS's own errors get through."""
    with pytest.raises(ConfigError, match=r"has splits \['train'\]: write 'name@split'"):
        read(f"{prepared}@test", format="tfds")
    with pytest.raises(ConfigError, match="is no TFDS data set"):
        read("no_such_data_set@train", format="tfds")


def test_tensorflow_is_imported_late():
    """Red if `import tensorflow` moves to the top of examples.py."""
    import subprocess
    import sys

    code = (
        "import sys, lemur_jax.data.sources, lemur_jax.data.reading.formats\n"
        "heavy = {'tensorflow', 'pyarrow', 'datasets', 'fsspec', 'zstandard', 'array_record'}\n"
        "sys.exit(str(heavy & set(sys.modules) or '') or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert examples.__doc__
