"""Google Cloud Storage and S3 emulated on loopback, with one bucket each, for the session."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import fsspec
import storage_proxy

from lm.storage import filesystems

BUCKET = "bucket1"
PROXIES = {}  # by scheme, of the emulators that are running


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(port, process):
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, "the emulator has ended"
        time.sleep(0.1)
    raise TimeoutError(f"no emulator at port {port}")


@contextlib.contextmanager
def emulators(**faults):
    """Start both behind proxies with `faults`; yield the environment variables for clients."""
    gcs, s3 = _free_port(), _free_port()
    bin_folder = os.path.dirname(sys.executable)
    commands = [
        ["gcp-storage-emulator", "start", "--host=127.0.0.1", f"--port={gcs}", "--in-memory",
         f"--default-bucket={BUCKET}"],
        ["moto_server", "-H", "127.0.0.1", "-p", str(s3)],
    ]  # fmt: skip
    environment = {
        # else gcsfs asks a gRPC service for a minute what kind of bucket it is
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with tempfile.TemporaryFile() as log:
        processes = [
            subprocess.Popen(
                [os.path.join(bin_folder, name), *rest],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for name, *rest in commands
        ]
        try:
            for port, process in zip((gcs, s3), processes, strict=True):
                _wait_for(port, process)
            import botocore.session

            client = botocore.session.Session().create_client(
                "s3",
                endpoint_url=f"http://127.0.0.1:{s3}",
                aws_access_key_id="a",
                aws_secret_access_key="b",
                region_name="us-east-1",
            )
            client.create_bucket(Bucket=BUCKET)
            with (
                storage_proxy.Proxy(f"http://127.0.0.1:{gcs}", **faults) as gs_proxy,
                storage_proxy.Proxy(f"http://127.0.0.1:{s3}", **faults) as s3_proxy,
            ):
                PROXIES.update(gs=gs_proxy, s3=s3_proxy)
                yield environment | {
                    "STORAGE_EMULATOR_HOST": gs_proxy.url,
                    "TENSORSTORE_GCS_HTTP_URL": gs_proxy.url,
                    "AWS_ENDPOINT_URL": s3_proxy.url,
                }
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def in_this_process(**faults):
    """As `emulators`, in the environment of this process, whose clients of before are forgotten: a
    client keeps the address that it began with.
    """

    def forget():
        filesystems.filesystem.cache_clear()
        for scheme in ("gs", "s3"):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()

    with emulators(**faults) as environment, mock.patch.dict(os.environ, environment):
        forget()
        try:
            yield
        finally:
            forget()


def main():
    """Run a command with both stores: object_stores.py [--fail=0.2 ...] -- COMMAND ..."""
    split = sys.argv.index("--")
    faults = [flag.removeprefix("--").split("=") for flag in sys.argv[1:split]]
    with emulators(**{name: float(value) for name, value in faults}) as environment:
        command = sys.argv[split + 1 :]
        sys.exit(subprocess.run(command, env=os.environ | environment).returncode)


if __name__ == "__main__":
    main()
