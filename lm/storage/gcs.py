"""Google Cloud Storage by gcsfs, with as many attempts of a request as S3 has."""

from typing import Any

import gcsfs
from gcsfs.retry import retry_request

from lm.storage.filesystems import ATTEMPTS

_gcsfs: Any = gcsfs.GCSFileSystem  # its decorators hide the types
_decorator: Any = retry_request


class FileSystem(gcsfs.GCSFileSystem):
    """gcsfs, whose number of attempts is no option: it was given when its class was made."""

    _request = _decorator(retries=ATTEMPTS)(_gcsfs._request.__wrapped__)
