"""Conversion to and from an object store: an S3 server on this machine."""

import os
import subprocess
import sys
import time

import pytest
import tiny_hf
from moto.server import ThreadedMotoServer

from lemur_jax import cli

URL = "s3://bucket/model"


@pytest.fixture(scope="module")
def store():
    """Environment of a process that finds the server where AWS would be."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield os.environ | {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    server.stop()


def lemur(store, *argv, code="sys.exit(cli.main(sys.argv[1:]))"):
    """A process of its own: s3fs and TensorStore read the environment once."""
    start = [sys.executable, "-c", f"import sys; from lemur_jax import cli; {code}"]
    return subprocess.run(
        [*start, *map(str, argv)], env=store, capture_output=True, text=True, timeout=300
    )


def test_there_and_back(store, tmp_path):
    """Red if TensorStore asked AWS itself, a chunk were written elsewhere than it is read, or
    TensorFlow were imported for the small files."""
    source = tiny_hf.write(tmp_path / "hf")
    bucket = "import s3fs; s3fs.S3FileSystem().mkdir('bucket')"
    assert lemur(store, code=bucket).returncode == 0
    no_tensorflow = "code = cli.main(sys.argv[1:]); sys.exit(code or 'tensorflow' in sys.modules)"
    there = lemur(store, "convert", source, URL, code=no_tensorflow)
    assert there.returncode == 0, there.stderr
    same = lemur(store, "convert", "verify", source, URL)
    assert same.returncode == 0 and "every bit" in same.stdout, same.stderr
    back = lemur(store, "convert", URL, tmp_path / "back", "--to=hf")
    assert back.returncode == 0, back.stderr
    assert cli.main(["convert", "verify", str(source), str(tmp_path / "back")]) == 0
    again = lemur(store, "convert", source, URL)
    assert again.returncode == 2 and f"{URL} is not empty" in again.stderr


@pytest.mark.slow
def test_goes_on_after_a_kill(store, tmp_path):
    """Red if the journal of a remote destination were local, or a block that was cut off counted
    as written."""
    source = tiny_hf.write(tmp_path / "hf")
    url = "s3://bucket/killed"
    lemur(store, code="import s3fs; s3fs.S3FileSystem().mkdir('bucket')")
    slow = (
        "import os; from lemur_jax.convert import chunks; old = chunks.ChunksTarget.write; n = []; "
        "chunks.ChunksTarget.write = lambda self, *a: "
        "(n.append(1), len(n) > 6 and os._exit(9), old(self, *a))[-1]; "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    assert lemur(store, "convert", source, url, code=slow).returncode == 9
    time.sleep(0.1)
    unfinished = lemur(store, "convert", url, tmp_path / "o", "--to=hf")
    assert unfinished.returncode == 2, unfinished.stdout
    done = lemur(store, "convert", source, url)
    assert done.returncode == 0, done.stderr
    assert lemur(store, "convert", "verify", source, url).returncode == 0
